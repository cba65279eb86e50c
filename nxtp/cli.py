"""The command `nxtp`. Commands are imported when they are called, so that help is fast."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import click

import nxtp
from nxtp.errors import UserError, nearest

HYDRA = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


class Commands(click.Group):
    """A group whose unknown commands name the nearest known one, and whose lazy commands are imported late."""

    lazy = {  # noqa: RUF012
        "app": "nxtp.deploy.app.command:app",
        "bench": "nxtp.bench.command:bench",
        "classify": "nxtp.inference.predict:classify",
        "convert": "nxtp.paper.convert:convert",
        "data": "nxtp.prepare.commands:data",
        "export": "nxtp.deploy.export:export",
        "predict": "nxtp.inference.predict:predict",
        "report": "nxtp.sweep.report.command:report",
        "serve": "nxtp.deploy.server:serve",
        "sweep": "nxtp.sweep.commands:sweep",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self.lazy]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self.lazy:
            module, attribute = self.lazy[name].split(":")
            try:
                return getattr(importlib.import_module(module), attribute)
            except ModuleNotFoundError as error:
                if name not in EXTRAS or (error.name or "").startswith("nxtp"):
                    raise
                raise UserError(f"nxtp {name} needs {error.name}: pip install 'nxtp[{EXTRAS[name]}]'.") from None
        return super().get_command(ctx, name)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if not name.startswith("-") and name not in self.list_commands(ctx):
            ctx.fail(f"No command '{name}'.{nearest(name, self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, SUMMARIES[name]) for name in SUMMARIES]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


EXTRAS = {"serve": "serve"}  # commands whose modules need what is not always installed
SUMMARIES = {
    "train": "Train a model, or with -m a sweep of them: nxtp train experiment=demo",
    "sweep": "How a sweep stands, or a search in place of a grid: nxtp sweep status STUDY",
    "report": "Run records → table and plot: nxtp report STUDY, nxtp report runs/mysweep",
    "evaluate": "Metrics of a model directory on shards: nxtp evaluate model=DIR data=scenes",
    "predict": "Labels of images: nxtp predict IMAGE… --model DIR --top-k 20",
    "classify": "The probability of each given label: nxtp classify IMAGE… --model DIR --labels FILE|imagenet1k",
    "describe": "Parameters, tokens, FLOPs and memory a rank of a configuration: nxtp describe experiment=demo",
    "features": "A frozen encoder's features, computed once: nxtp features data.train=SHARDS data.features=DIR …",
    "data": "Look at shards, and check them: nxtp data show SHARDS, nxtp data verify DIR",
    "convert": "Published checkpoints in and out: nxtp convert CKPT --llama DIR --clip openai --to DIR",
    "app": "A page to try a model in a browser: nxtp app DIR",
    "serve": "Answer HTTP requests, batched: nxtp serve DIR",
    "export": "A checkpoint → a model directory, or that → ONNX: nxtp export CKPT --to DIR, nxtp export DIR --onnx OUT",
    "parity": "Check against recorded numbers of the published implementation: nxtp parity DIR",
    "bench": "Ours beside the published way of computing it: nxtp bench train|predict|closed|data|metric|…",
}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nxtp.__version__, prog_name="nxtp")
def group() -> None:
    """Object recognition as next token prediction: images in, ranked labels out."""


# Commands whose arguments are Hydra's: what they run, on which configuration of conf/, with which overrides.
HYDRA_COMMANDS = {
    "train": ("nxtp.train.command:train", "train", ()),
    "evaluate": ("nxtp.eval.command:evaluate", "evaluate", ()),
    "describe": ("nxtp.cost.describe:describe", "train", ("name=describe",)),
    "features": ("nxtp.data.features.compute:extract", "train", ("name=features",)),
}


def _hydra_command(name: str) -> None:
    function, config_name, own = HYDRA_COMMANDS[name]

    def run(context: click.Context) -> None:
        from nxtp.config import compose_and_run
        from nxtp.sweep.sweep import Sweeper

        arguments = [*own, *context.args]
        if name == "evaluate":  # `model` is a configuration group of training; here it names a directory
            arguments = [f"model_dir={a.removeprefix('model=')}" if a.startswith("model=") else a for a in arguments]
        compose_and_run(function, config_name, arguments, None if own else Sweeper(name))

    command = click.pass_context(run)
    group.command(name, context_settings=HYDRA, help=SUMMARIES[name], add_help_option=False)(command)


for _name in HYDRA_COMMANDS:
    _hydra_command(_name)


@group.command()
@click.argument("directory", type=click.Path(path_type=Path))
def parity(directory: Path) -> None:
    """Check this implementation against the numbers recorded in DIRECTORY; exit code 1 on a miss."""
    from nxtp.paper.parity import main as run

    sys.exit(run(directory))


def main() -> None:
    """Entry point: errors meant for the user are one line, exit code 1."""
    arguments = sys.argv[1:]
    command = os.environ.get("NXTP_COMMAND")
    if command and "LOCAL_RANK" in os.environ and (not arguments or arguments[0] != command):
        arguments = [command, *arguments]  # started anew by a distributed launcher
    try:
        group.main(arguments, prog_name="nxtp", standalone_mode=True)
    except UserError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
