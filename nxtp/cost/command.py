"""`nxtp describe`: what a configuration costs; with --plan, on many GPUs."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from nxtp.errors import nearest


def _numbers(context: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise click.BadParameter(f"must be numbers above 0 with commas between them, as in 8,32,256, got '{value}'.")
    return numbers


@click.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    options_metavar="[OVERRIDES of nxtp train] [--plan [OPTIONS]]",
)
@click.option("--plan", is_flag=True, help="Hours, bytes sent and memory of a recipe on many GPUs, by formula.")
@click.option("--gpus", default="8,32,256", show_default=True, callback=_numbers, help="Eight per node.")
@click.option("--gpu", default="H100 SXM", show_default=True, help="As RTX 4090, A100, L4, H200.")
@click.option("--mfu", type=click.FloatRange(0, 1, min_open=True), default=0.45, show_default=True, help="Assumed.")
@click.option("--images", type=click.IntRange(1), help="Of the whole run; default: the recipe's samples and epochs.")
@click.option("--inside", type=float, default=450.0, show_default=True, help="GB/s per GPU in a node.")
@click.option("--between", type=float, default=50.0, show_default=True, help="GB/s per GPU between nodes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@click.pass_context
def describe(context: click.Context, plan: bool, as_json: bool, **options: Any) -> None:
    """Parameters by part, tokens, FLOPs and memory per rank of a configuration, in seconds and without data."""
    from hydra._internal.utils import get_args_parser

    from nxtp.config import compose_and_run, help_text

    arguments = ["name=describe", "hydra.run.dir=.", *context.args]  # Hydra creates the run's directory
    if {"--help", "-h"} & set(arguments):
        click.echo(f"{context.get_help()}\n\n{help_text('describe', 'train', arguments)}")
        return
    names = [f"--{name.replace('_', '-')}" for name in options]  # of those that need --plan
    for unknown in get_args_parser().parse_known_intermixed_args(context.args)[1]:
        context.fail(f"No option '{unknown}'.{nearest(unknown, ['--plan', '--json', *names])}")
    if not plan:
        for name, option in zip(names, options, strict=True):
            if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
                context.fail(f"{name} needs --plan.")

    composed: list[Any] = []
    compose_and_run(composed.append, "train", arguments)
    if not composed:  # with --cfg, which prints the configuration and stops
        return
    if plan:
        from nxtp.cost.plan import print_plan

        print_plan(composed[0], " ".join(context.args), as_json=as_json, **options)
    else:
        from nxtp.cost.describe import print_description

        print_description(composed[0], as_json)
