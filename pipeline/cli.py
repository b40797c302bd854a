"""The console script `hatchery`: parses and calls, holds no logic.

Errors that a user can cause are one line on stderr and exit code 2; `--debug` shows where they come from.
"""

import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console

from data_prep.redact import without_secrets
from data_prep.uri import StorageError, printable
from pipeline import cli_registry, cli_retrain, cli_shards
from pipeline.cli_registry import Tracebacks
from pipeline.errors import Stopped, describe_os_error

app = typer.Typer(
    name="hatchery",
    help="Pre-train, cascade, fine-tune, judge and promote super-resolution transformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


_USERS_ERRORS = (ValueError, OSError, MemoryError)


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
    from pipeline.buckets import use_buckets
    from pipeline.config import load_recipe
    from pipeline.survey import Choice

    loaded = load_recipe(recipe, override or [])
    use_buckets(loaded)
    choice = Choice(stages.split(",") if stages else None, first, last)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if dry_run:
        from pipeline import dry_run as look

        look.run(loaded, choice, console)
    else:
        from pipeline import pretrain as job
        from pipeline import signals

        with signals.ending():
            job.run(loaded, choice, console, address, debug)


@app.command("plan")
def plan_command(
    recipe: Annotated[str, typer.Option(help="YAML file, or the name of one in configs/recipe.")],
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="Training processes on each; default 8 where the recipe wants GPUs, else those that are here."
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(min=0.1, help="GB of each GPU.")] = 80,
    cpus: Annotated[
        int | None, typer.Option(min=1, help="Without GPUs: cores of each machine; default as this one.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.1, help="Without GPUs: GB of each machine; default what is free here.")
    ] = None,
    step_time: Annotated[
        float | None, typer.Option(min=1e-6, help="With GPUs: measured seconds per optimizer step.")
    ] = None,
    image_kb: Annotated[
        float, typer.Option(min=0.1, help="With GPUs: mean size of a training image; ImageNet has 110.")
    ] = 110,
    override: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    debug: Tracebacks = False,
) -> None:
    """What a recipe needs: memory, traffic and days on GPUs; processes, memory and hours on CPUs.

    For GPUs where the recipe wants them (compute.use_gpu) or --gpus-per-node is given, else for CPUs. Measures one
    sample on this machine.
    """
    from pipeline import capacity_report
    from pipeline.config import load_recipe

    if cpus is not None and gpus_per_node is not None:
        raise ValueError(f"--cpus {cpus} and --gpus-per-node {gpus_per_node} exclude one another: give one of them")
    loaded = load_recipe(recipe, override or [])
    console = Console(width=None if sys.stdout.isatty() else 120)
    gpus = gpus_per_node if cpus is None else None
    if cpus is None and gpus is None:
        gpus = capacity_report.gpus_wanted(loaded)
    if gpus is None:
        capacity_report.for_cpus(loaded, nodes, cpus, memory, console)
    else:
        capacity_report.for_gpus(loaded, nodes, gpus, gpu_memory, step_time, image_kb, console)


@app.command("config")
def config_command(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="A key, or a section with all below it; default all.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="With the values of this one: YAML file, or the name of one in configs/recipe.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")] = None,
    debug: Tracebacks = False,
) -> None:
    """Print every key of a recipe: its value, its default, what it is for, what it takes."""
    from pipeline import config_reference
    from pipeline.config import load_recipe

    if override and recipe is None:
        raise ValueError(f"--set {override[0]} needs a recipe to change: give --recipe")
    loaded = load_recipe(recipe, override or []) if recipe is not None else None
    for found in config_reference.chosen(config_reference.keys(loaded), key):
        typer.echo(found.as_line())


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
    skip_existing: Annotated[
        bool,
        typer.Option(
            "--skip-existing",
            help="Go on after a stop: leave out images whose results are there, not older, and of the wanted size.",
        ),
    ] = False,
    result_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="png, tif, jpg, webp or bmp, for folders; auto: the image's own, or png where that cannot hold "
            "its 16 bits or alpha.",
        ),
    ] = "auto",
    quality: Annotated[
        int | None, typer.Option(help="1 to 100, of JPEG (95) and WebP (without loss unless this is given).")
    ] = None,
    suffix: Annotated[
        str, typer.Option(help="Goes into the names of a folder's results: _x4 makes photo_x4.png.")
    ] = "",
    outscale: Annotated[
        float | None, typer.Option(help="Sides of the result over the image's: the network first, then one resize.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Of the result, px; alone, the height follows.")] = None,
    height: Annotated[int | None, typer.Option(help="Of the result, px; alone, the width follows.")] = None,
    alpha: Annotated[str, typer.Option(help="Transparency: enlarged by the network, by bicubic, or drop.")] = "network",
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, cuda:1, several by commas; auto: all GPUs, which share a folder, else cpu."),
    ] = "auto",
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
    precision: Annotated[
        str, typer.Option(help="fp32, bf16 (emulated, and slow, where the processor lacks it), or auto.")
    ] = "auto",
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

    EXIF, XMP, resolution and colour profile are kept. Exit code 1 where some images of a folder failed; the others
    are done.
    """
    from pipeline import upscale, upscale_files, upscale_image

    task = upscale.Task(
        source,
        target,
        upscale.Source(weights, model, scale, tracking_uri, interval_size),
        upscale_files.Naming(result_format, suffix, alpha != "drop"),
        upscale_image.Wanted(outscale, width, height, alpha, quality),
        upscale.Options(tile, tile_overlap, tile_batch, ensemble, precision, compiled),
        device,
        skip_existing,
    )
    problems = upscale.carry_out(task, Console(width=None if sys.stdout.isatty() else 120))
    for problem in problems:
        typer.echo(f"hatchery: {printable(problem)}", err=True)
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
    """Write a network as ONNX or as a torch.export program, for images of any height and width, any number at once.

    Says what it does and how long it took.
    """
    from pipeline.export import export as export_network
    from pipeline.upscale import Source

    file, model = (None, weights) if weights.startswith("models:/") else (weights, None)
    console = Console(width=None if sys.stdout.isatty() else 120)
    typer.echo(export_network(Source(file, model, None, tracking_uri, interval_size), target, console))


shards = typer.Typer(help="Make a set of shards, look at one, check one.", no_args_is_help=True)
app.add_typer(shards, name="shards")
ShardSet = Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of the set.")]
cli_shards.add_to(shards)


@shards.command("ls")
def shards_ls(uri: ShardSet, debug: Tracebacks = False) -> None:
    """List the shards of a set."""
    from data_prep.verify import describe

    for row in describe(uri):
        typer.echo("\t".join(printable(str(value)) for value in row))


@shards.command("verify")
def shards_verify(uri: ShardSet, debug: Tracebacks = False) -> None:
    """Re-read every shard and check every hash; exit code 1 where something is not as the index says."""
    from data_prep.verify import verify

    report = verify(uri)
    for problem in report.problems:
        typer.echo(printable(problem), err=True)
    typer.echo(f"{printable(report.uri)}: {report.num_shards} shards, {'sound' if report.is_sound else 'damaged'}")
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
        sys.stderr.write(f"hatchery: {_one_line(error, arguments[0] if arguments else 'hatchery')}\n")
        sys.exit(2)


def _is_users(error: Exception) -> bool:
    """Whether a user can cause an error: also what MLflow refuses."""
    return isinstance(error, (*_USERS_ERRORS, *_mlflow_errors()))


def _mlflow_errors() -> tuple[type[Exception], ...]:
    """MLflow's errors; none where MLflow, which is slow to import, was not imported."""
    mlflow = sys.modules.get("mlflow.exceptions")
    return (mlflow.MlflowException,) if mlflow is not None else ()


def _one_line(error: Exception, command: str) -> str:
    """The error's own words without secrets; of one that came through Ray, the words of its cause;
    the system's with path and place.

    No name in them breaks the line.
    """
    cause = getattr(error, "cause", None)
    told = cause if isinstance(cause, Exception) else error
    if isinstance(told, _mlflow_errors()):
        return printable(without_secrets(f"MLflow refuses: {' '.join(str(told).split())[:300]}"))
    text = without_secrets(describe_os_error(told, command) if isinstance(told, OSError) else str(told))
    lines = [text] if isinstance(told, StorageError) else text.split("\n")  # a config's faults are many
    return "\n".join(map(printable, lines))


if __name__ == "__main__":
    main()
