"""The command `nxtp`. A command's module is imported when the command is called, so that help is fast."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys

import click

import nxtp
from nxtp.errors import NO_SPACE, UserError, nearest
from nxtp.runs.processes import follow_parent, is_first_rank

# name → (what it runs, its line in `nxtp --help`)
COMMANDS = {
    "train": ("hydra", "Train a model; with -m or study=, a sweep of models"),
    "sweep": ("nxtp.sweep.commands:sweep", "Show the runs of a sweep: state, progress, best metric"),
    "report": ("nxtp.sweep.report.command:report", "Make a table and a plot from run records"),
    "evaluate": ("hydra", "Measure a model directory on shards"),
    "calibrate": ("hydra", "Fit label probabilities to what is right on held-out images"),
    "predict": ("nxtp.inference.predict:predict", "Label images, most probable label first"),
    "classify": ("nxtp.inference.predict:classify", "Give the probability of each of your classes"),
    "describe": ("nxtp.cost.command:describe", "Count parameters, FLOPs and memory of a configuration; plan its hours"),
    "features": ("hydra", "Compute a frozen encoder's features once"),
    "prepare": ("nxtp.prepare.commands:prepare", "Make shards from a dataset or a folder of pictures"),
    "data": ("nxtp.prepare.commands:data", "Look at shards and check them"),
    "convert": ("nxtp.paper.commands:convert", "Convert published checkpoints, both ways"),
    "app": ("nxtp.deploy.app.command:app", "Try a model on a page in the browser"),
    "serve": ("nxtp.deploy.server:serve", "Serve a model over HTTP"),
    "export": ("nxtp.deploy.export:export", "Write a checkpoint as a model directory, or a model as ONNX"),
    "parity": ("nxtp.paper.commands:parity", "Check against recorded numbers of the published implementation"),
    "bench": ("nxtp.bench.command:bench", "Benchmark against the reference implementation"),
}

# Commands with Hydra's arguments: what they run, on which configuration of conf/, with which overrides; an example.
HYDRA_COMMANDS = {
    "train": ("nxtp.train.command:train", "train", (), "experiment=demo optim.lr=3e-4 name=mine"),
    "evaluate": ("nxtp.eval.command:evaluate", "evaluate", (), "model=runs/demo/model data=scenes top_k=5"),
    "calibrate": (
        "nxtp.eval.calibrate:calibrate",
        "evaluate",
        ("name=calibrate", "hydra.run.dir=.", "hydra.job.name=calibrate"),
        "runs/demo/model data=scenes",
    ),
    "features": (
        "nxtp.data.features.compute:extract",
        "train",
        ("name=features", "hydra.run.dir=."),
        "data.train=SHARDS data.features=DIR",
    ),
}


class Commands(click.Group):
    """Imports a command when it is called; an unknown name is answered with the nearest known one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in HYDRA_COMMANDS:
            return _hydra_command(name)
        if name not in COMMANDS:
            return None
        try:
            return pkgutil.resolve_name(COMMANDS[name][0])
        except ModuleNotFoundError as error:
            if name != "serve" or (error.name or "").startswith("nxtp"):
                raise
            raise UserError(f"nxtp serve needs {error.name}: pip install 'nxtp[serve]'.") from None

    def resolve_command(self, ctx: click.Context, args: list[str]):
        name = args[0]
        if not name.startswith("-") and name not in COMMANDS:
            ctx.fail(f"No command '{name}'.{nearest(name, COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would exit with 1
            if is_first_rank():
                click.echo("\nStopped by Ctrl-C.", err=True)
            ctx.exit(130)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _hydra_command(name: str) -> click.Command:
    """A command that passes all arguments to Hydra, `--help` too."""
    function, config_name, overrides, example = HYDRA_COMMANDS[name]

    def run(context: click.Context) -> None:
        from nxtp.config import compose_and_run, help_text
        from nxtp.sweep.sweep import run_or_sweep

        arguments = [*overrides, *context.args]
        if name == "calibrate" and context.args and "=" not in context.args[0] and context.args[0][0] not in "-+~":
            arguments = [*overrides, f"model_dir={context.args[0]}", *context.args[1:]]
        if name in ("evaluate", "calibrate"):  # `model` is a configuration group of training; here it names a directory
            arguments = [f"model_dir={a.removeprefix('model=')}" if a.startswith("model=") else a for a in arguments]
        if {"--help", "-h"} & set(arguments):
            text = help_text(name, config_name, arguments)
            text = text.replace("model_dir: ???", "model: ???     (needed: a model directory or hub name)")
            click.echo(f"{COMMANDS[name][1]}: nxtp {name} {example}\n\n{text}")
            return
        (compose_and_run if name in ("features", "calibrate") else run_or_sweep)(function, config_name, arguments)

    settings = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
    return click.Command(name, callback=click.pass_context(run), context_settings=settings, add_help_option=False)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(nxtp.__version__, prog_name="nxtp")
def group() -> None:
    """Object recognition as next token prediction: images in, ranked labels out."""


def import_own() -> None:
    """Import the user's modules, which register an encoder, a decoder, … (docs/extending.md)."""
    names = os.environ.get("NXTP_IMPORT", "")
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for name in filter(None, names.split(",")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(f"NXTP_IMPORT: '{name}' cannot be imported: {error}") from error


def main() -> None:
    """Entry point: an error meant for the user is one line and exit code 1."""
    follow_parent()
    arguments = sys.argv[1:]
    command = os.environ.get("NXTP_COMMAND")
    if command and "LOCAL_RANK" in os.environ and (not arguments or arguments[0] != command):
        arguments = [command, *arguments]  # started again by a distributed launcher
    try:
        import_own()
        group.main(arguments, prog_name="nxtp", standalone_mode=True)
    except UserError as error:
        click.secho(f"error: {error}", fg="red", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        where = f": '{error.filename}'" if error.filename else ""
        text = f"error: {error.strerror}{where}. Free some space and run the same command again."
        click.secho(text, fg="red", err=True)
        sys.exit(1)
