"""The console script `hatchery`: parses and calls, holds no logic.

Errors that a user can cause are one line on stderr and exit code 2; `--debug` shows where they come from.
"""

import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console

from data_prep.redact import without_secrets
from pipeline import cli_registry, cli_retrain, cli_shards
from pipeline.cli_registry import Tracebacks
from pipeline.errors import Stopped

app = typer.Typer(
    name="hatchery",
    help="Pre-train, cascade, fine-tune, judge and promote super-resolution transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_USERS_ERRORS = (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, MemoryError)


@app.callback()
def hatchery() -> None:
    """Pre-train, cascade, fine-tune, judge and promote super-resolution transformers."""


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of one in configs/recipe.")],
    override: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. storage.uri=s3://b/p."),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="Only these stages or groups, e.g. shard,pretrain,finetune-x2.")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="Begin with this stage or group.")] = None,
    last: Annotated[str | None, typer.Option("--until", help="End with this stage or group.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print which stages are done and which would run.")
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster; default $RAY_ADDRESS, else a local one. 'local' forces a local one."),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of Ray's workers.")] = False,
) -> None:
    """Run a recipe: shard, pre-train, cascade, fine-tune, evaluate, register, promote. Finished stages are skipped."""
    from pipeline import pretrain as job
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, override or [])
    choice = job.Choice(stages.split(",") if stages else None, first, last)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if dry_run:
        job.dry_run(loaded, choice, console)
    else:
        job.run(loaded, choice, console, address, debug)


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of one in configs/recipe.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Training processes on each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GB of each GPU.")] = 80,
    step_time: Annotated[float | None, typer.Option(min=1e-6, help="Measured seconds per optimizer step.")] = None,
    image_kb: Annotated[float, typer.Option(min=0.1, help="Mean size of a training image; ImageNet has 110.")] = 110,
    override: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    debug: Tracebacks = False,
) -> None:
    """What a recipe needs on a cluster: memory per ZeRO stage, traffic, days. Measures one sample on this machine."""
    from pipeline import capacity
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, override or [])
    machines = capacity.Machines(nodes, gpus_per_node, gpu_memory)
    for phase in loaded.phases.values():
        if phase.global_batch < machines.gpus:
            raise ValueError(f"{machines.gpus} GPUs are more than the global batch {phase.global_batch}: use fewer")
    training = next(iter(loaded.trainings))
    bf16 = loaded.phases[loaded.trainings[training].phase].precision != "fp32"
    sample = capacity.measure_sample(loaded, training, bf16)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(capacity.memory_table(loaded, training, machines, sample))
    console.print(capacity.training_table(loaded, machines, sample, step_time, image_kb))
    for line in capacity.notes(loaded, training, machines, sample, step_time is not None):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


@app.command("upscale")
def upscale_images(
    source: Annotated[str, typer.Argument(metavar="IN", help="An image, or a folder of images.")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="Where the result goes; a folder for a folder.")],
    weights: Annotated[
        str | None, typer.Option(help="A .pth or .safetensors file, published ones too; no config needed.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A registered model: models:/NAME@champion or models:/NAME/VERSION.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(help="Must be the network's; alone it means the registry's champion of that scale.")
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            help="Side in px of the squares to work on; by default as free memory asks. "
            "Tiles of HMANet are another answer than the whole image."
        ),
    ] = None,
    tile_overlap: Annotated[
        int | None, typer.Option(help="How far neighbouring tiles overlap, px; default 4 windows of the network.")
    ] = None,
    tile_batch: Annotated[int, typer.Option(help="Tiles worked on at once.")] = 1,
    ensemble: Annotated[
        bool, typer.Option("--ensemble", help="The mean over 8 flips and turns: a little better, 8 times slower.")
    ] = False,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or auto: bf16 where the processor has it.")] = "auto",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="By torch.compile: minutes for each new size; needs a C++ compiler."),
    ] = False,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; default $MLFLOW_TRACKING_URI, else runs/mlflow.db.")
    ] = None,
    interval_size: Annotated[
        int | None, typer.Option(help="HMANet's, where a .pth file's is not the published 4: weights do not show it.")
    ] = None,
    debug: Tracebacks = False,
) -> None:
    """Upscale an image or a folder of images: 8 and 16 bits, gray, RGB, alpha; PNG, JPEG, TIFF, WebP, BMP.

    Exit code 1 where some images of a folder failed; the others are done.
    """
    from pipeline import upscale

    jobs = upscale.plan(source, target)
    network, name = upscale.open_network(upscale.Source(weights, model, scale, tracking_uri, interval_size))
    options = upscale.Options(tile, tile_overlap, tile_batch, ensemble, precision, compiled)
    problems = upscale.run(jobs, network, name, options, Console(width=None if sys.stdout.isatty() else 120))
    for problem in problems:
        typer.echo(f"hatchery: {problem}", err=True)
    raise typer.Exit(1 if problems else 0)


@app.command()
def export(
    weights: Annotated[str, typer.Argument(help="A .pth or .safetensors file, or a registered model models:/...")],
    target: Annotated[str, typer.Argument(metavar="OUT", help="NAME.onnx, or NAME.pt2 for torch.export.")],
    interval_size: Annotated[
        int | None, typer.Option(help="HMANet's, where a .pth file's is not the published 4: weights do not show it.")
    ] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; default $MLFLOW_TRACKING_URI, else runs/mlflow.db.")
    ] = None,
    debug: Tracebacks = False,
) -> None:
    """Write a network as ONNX or as a torch.export program, for images of any height and width."""
    from pipeline import upscale

    file, model = (None, weights) if weights.startswith("models:/") else (weights, None)
    typer.echo(upscale.export(upscale.Source(file, model, None, tracking_uri, interval_size), target))


shards = typer.Typer(help="Make a set of shards, look at one, check one.", no_args_is_help=True)
app.add_typer(shards, name="shards")
ShardSet = Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of the set.")]
cli_shards.add_to(shards)


@shards.command("ls")
def shards_ls(uri: ShardSet, debug: Tracebacks = False) -> None:
    """List the shards of a set."""
    from data_prep.verify import describe

    for row in describe(uri):
        typer.echo("\t".join(str(value) for value in row))


@shards.command("verify")
def shards_verify(uri: ShardSet, debug: Tracebacks = False) -> None:
    """Re-read every shard and check every hash; exit code 1 where something is not as the index says."""
    from data_prep.verify import verify

    report = verify(uri)
    for problem in report.problems:
        typer.echo(problem, err=True)
    typer.echo(f"{report.uri}: {report.num_shards} shards, {'sound' if report.is_sound else 'damaged'}")
    raise typer.Exit(0 if report.is_sound else 1)


cli_registry.add_to(app)
cli_retrain.add_to(app)


def main(arguments: list[str] | None = None) -> None:
    """Entry of the console script; ends the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)  # ends the process by itself, with code 2 for faults of the command line
    except Stopped as stop:
        sys.stderr.write(f"hatchery: {stop}; the same command continues\n")
        sys.exit(stop.exit_code)
    except Exception as error:  # noqa: BLE001 - a traceback is written all the same, without secrets
        if not _is_users(error):
            sys.stderr.write(without_secrets(traceback.format_exc()))
            sys.exit(1)
        if "--debug" in arguments:
            sys.stderr.write(without_secrets(traceback.format_exc()))
        sys.stderr.write(f"hatchery: {_one_line(error)}\n")
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Whether a user can cause an error: also what MLflow refuses."""
    return isinstance(error, (*_USERS_ERRORS, *_mlflow_errors()))


def _mlflow_errors() -> tuple[type[Exception], ...]:
    """MLflow's errors; none where MLflow, which is slow to import, was not imported."""
    mlflow = sys.modules.get("mlflow.exceptions")
    return (mlflow.MlflowException,) if mlflow is not None else ()


def _one_line(error: Exception) -> str:
    """The error's own words without secrets; of one that came through Ray, the words of its cause."""
    cause = getattr(error, "cause", None)
    found = cause if isinstance(cause, Exception) else error
    if isinstance(found, _mlflow_errors()):
        return without_secrets(f"MLflow refuses: {' '.join(str(found).split())[:300]}")
    return without_secrets(str(found))


if __name__ == "__main__":
    main()
