"""The commands `hatchery retrain` and `hatchery schedule`: parse and call."""

from typing import Annotated, Literal

import typer

from pipeline.cli_registry import Address, Debug, Tracebacks, console

Domain = Annotated[str, typer.Argument(help="YAML file of the domain, e.g. configs/domain/text.yaml.")]
Override = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. storage.uri=s3://b/p.")
]


def add_to(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    app.command()(retrain)
    schedule = typer.Typer(no_args_is_help=True)
    schedule.command()(render)
    schedule.callback()(_schedule)
    app.add_typer(schedule, name="schedule")


def _schedule() -> None:
    """Retrain a domain on a schedule: hatchery schedule render configs/domain/text.yaml."""


def retrain(
    domain: Domain,
    override: Override = None,
    now: Annotated[bool, typer.Option("--now", help="Retrain on whatever is new, however little.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done.")] = False,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Fine-tune the champion on a domain's new images, judge it, promote it where the gate lets it.

    Exit code 0 also where nothing is new, another run is at it, or the gate refuses.
    """
    from pipeline import retrain as job
    from pipeline import signals
    from pipeline.buckets import use_buckets
    from pipeline.domain import load_domain

    loaded = load_domain(domain, override or [])
    use_buckets(loaded)
    if dry_run:
        job.dry_run(loaded, console(), now)
    else:
        with signals.ending():
            job.run(loaded, console(), address, debug, now)


def render(
    domain: Domain,
    override: Override = None,
    kind: Annotated[
        Literal["cronjob", "raycronjob", "cron"],
        typer.Option(help="Kubernetes CronJob of a RayJob; KubeRay's RayCronJob (alpha); a crontab line."),
    ] = "cronjob",
    debug: Tracebacks = False,
) -> None:
    """Print manifests for kubectl, or a crontab line, that retrain the domain on its schedule."""
    from pipeline import cronjobs
    from pipeline.domain import load_domain

    overrides = override or []
    typer.echo(cronjobs.render(load_domain(domain, overrides), kind, domain, overrides), nl=False)
