"""`effnet-export`: a checkpoint for timm, torchvision, the Hugging Face hub, ONNX or torch.export."""

from pathlib import Path

from omegaconf import DictConfig

from effnet_train.cli.app import command
from effnet_train.cli.checkpoint_data import without_preprocess


def task(cfg: DictConfig) -> None:
    """Load the checkpoint, write it in the format asked for, and say how exact it is."""
    from effnet_train.cli import build, check
    from effnet_train.cli.soup import check_soup, cook
    from effnet_train.engine.checkpoint import find_checkpoint
    from effnet_train.export import SUFFIXES, export, push_to_hub
    from effnet_train.models.published import is_name

    config = without_preprocess(cfg)
    check.check_config(config, check.EXPORT)
    check_soup(config)
    fmt = config["format"]
    if config["push_to_hub"] and fmt != "hub":
        raise ValueError(f"push_to_hub={config['push_to_hub']} needs format=hub, not format={fmt}")
    name = config["checkpoint"] or config["average"][0]
    # Published weights lie in a cache: what is made of them goes into the current folder.
    file = Path(name.replace(":", "-").replace("/", "-") + ".pth") if is_name(name) else find_checkpoint(Path(name))
    if config["average"]:  # beside none of them
        file = Path("soup.pt")
    output = Path(config["output"]) if config["output"] else file.with_name(file.stem + SUFFIXES.get(fmt, ""))
    if output.resolve() == file.resolve():
        raise ValueError(f"output={output} is the checkpoint itself: choose another name")
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"output={output}: its folder does not exist, make it first")
    model, meta = cook(config)
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
