"""The commands `hatchery evaluate`, `promote`, `rollback` and `history`: parse and call."""

import sys
from typing import Annotated

import typer
from rich.console import Console

Tracking = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow URI; default $MLFLOW_TRACKING_URI, else runs/mlflow.db.")
]
Address = Annotated[str | None, typer.Option(help="Ray cluster; default $RAY_ADDRESS, else a local one.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of Ray's workers.")]
Tracebacks = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
Name = Annotated[str, typer.Argument(help="Registered model, e.g. demo-x2.")]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    for command in (evaluate, promote, rollback, history):
        app.command()(command)


def console() -> Console:
    """A terminal's own width, else wide enough that tables keep their columns."""
    return Console(width=None if sys.stdout.isatty() else 160)


def evaluate(
    weights: Annotated[
        list[str], typer.Option(help=".pth or .safetensors of HAT or HMANet, or models:/NAME@alias; repeatable.")
    ],
    sets: Annotated[
        list[str], typer.Option(help="Folder or s3:// prefix with images, or HR/ and LR_bicubic/X2 ...; repeatable.")
    ],
    ensemble: Annotated[bool, typer.Option("--ensemble", help="Average eight flips and rotations.")] = False,
    rgb: Annotated[bool, typer.Option("--rgb", help="PSNR over RGB as well.")] = False,
    lpips: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="BACKBONE CALIBRATION", help="LPIPS by these weights: torchvision's and the authors'."),
    ] = None,
    dists: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="VGG16 CALIBRATION", help="DISTS by these weights: torchvision's and the authors'."),
    ] = None,
    tile: Annotated[int | None, typer.Option(min=16, help="Work on squares of this side, low-resolution px.")] = None,
    degrade: Annotated[
        str | None,
        typer.Option(metavar="STEPS", help="YAML list that makes the input images: '[{step: noise, sigma: 25}]'."),
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=NUMBER", help="What weights do not tell, e.g. conv_scale=0.01.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=0, help="So many worst and best images of each set.")] = 2,
    out: Annotated[str, typer.Option(help="Folder for reports and pictures.")] = "evaluation",
    tracking: Tracking = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Judge weights on benchmarks by the published protocol; several weights are compared image by image."""
    from pipeline import judge_weights
    from pipeline.benchmark import DistsConfig, LpipsConfig, Protocol

    protocol = Protocol(
        ensemble=ensemble,
        rgb=rgb,
        lpips=LpipsConfig(backbone=lpips[0], calibration=lpips[1]) if lpips else None,
        dists=DistsConfig(backbone=dists[0], calibration=dists[1]) if dists else None,
        tile=tile,
    )
    request = judge_weights.Request(weights, sets, protocol, option or [], degrade, pictures, out, tracking)
    judge_weights.run(request, console(), address, debug)


def promote(
    name: Name,
    version: Annotated[str | None, typer.Option(help="Version; default: the one called candidate.")] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="YAML file with a promotion rule, e.g. configs/rule.yaml: better, not_worse, metric, decide_by, "
            "confidence, max_slowdown, max_growth; default: the version's own."
        ),
    ] = None,
    force: Annotated[str | None, typer.Option(metavar="REASON", help="Promote without asking the gate.")] = None,
    tracking: Tracking = None,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Put a version to the gate and make it champion if it passes; exit code 1 where it does not."""
    from pipeline import registry_commands

    decision = registry_commands.promote(name, version, rule, force, tracking, address, debug)
    alias = "champion" if decision.promoted else "not promoted"
    typer.echo(f"{decision.name} version {decision.version}: {alias} ({decision.reason})")
    raise typer.Exit(0 if decision.promoted else 1)


def rollback(
    name: Name,
    reason: Annotated[str, typer.Option(help="Why; kept in the history.")] = "by hand",
    tracking: Tracking = None,
    debug: Tracebacks = False,
) -> None:
    """Make the previous champion champion again."""
    from pipeline import registry_commands

    event = registry_commands.rollback(name, reason, tracking)
    typer.echo(f"{name}: version {event.version} is champion again, version {event.before} is previous")


def history(name: Name, tracking: Tracking = None, debug: Tracebacks = False) -> None:
    """Show who was champion when, and why."""
    from pipeline import registry_commands

    console().print(registry_commands.history(name, tracking))
