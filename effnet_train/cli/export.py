"""`effnet-export`: a checkpoint for timm, torchvision, the Hugging Face hub, ONNX or torch.export."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from effnet_train.cli.app import command


def task(cfg: DictConfig) -> None:
    """Load the checkpoint, write it in the format asked for, and say how exact it is."""
    from effnet_train.cli import build, check
    from effnet_train.distributed import Session
    from effnet_train.engine.checkpoint import find_checkpoint
    from effnet_train.export import SUFFIXES, export, push_to_hub
    from effnet_train.models.published import is_name

    config: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check.check_config(config, check.EXPORT)
    fmt = config["format"]
    if config["push_to_hub"] and fmt != "hub":
        raise ValueError(f"push_to_hub={config['push_to_hub']} needs format=hub, not format={fmt}")
    name = config["checkpoint"]
    # Published weights lie in a cache: what is made of them goes into the current folder.
    file = Path(name.replace(":", "-").replace("/", "-") + ".pth") if is_name(name) else find_checkpoint(Path(name))
    output = Path(config["output"]) if config["output"] else file.with_name(file.stem + SUFFIXES.get(fmt, ""))
    if output.resolve() == file.resolve():
        raise ValueError(f"output={output} is the checkpoint itself: choose another name")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output={output}: its folder does not exist, make it first")
    model, meta = build.load_model(name, Session(), which=config["weights"], source=config["source"])
    difference = export(
        model, meta, fmt, output, variants=build.model_variants(), fold=config["fold"], hub_name=config["push_to_hub"]
    )
    print(f"{output}: {fmt}, logits within {difference:.1g} of the largest")
    if Path(f"{output}.json").is_file():
        print(f"{output}.json: its preprocessing and classes; keep it beside")
    if config["push_to_hub"]:
        print(push_to_hub(output, config["push_to_hub"]))


main = command("export", task)

if __name__ == "__main__":
    main()
