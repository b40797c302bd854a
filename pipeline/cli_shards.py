"""The command `hatchery shards make`: parses and calls."""

from typing import Annotated

import typer

from data_prep.image_files import MAX_PIXELS
from pipeline.cli_registry import Address, Debug, console


def add_to(shards: typer.Typer) -> None:
    """Add the command to `hatchery shards`."""
    shards.command()(make)


def make(
    source: Annotated[
        str, typer.Argument(help="Folder, s3://bucket/prefix, .tar (of class tars, too), .txt of these, photographs:.")
    ],
    uri: Annotated[str, typer.Argument(help="Folder or s3://bucket/prefix of the set.")],
    samples_per_shard: Annotated[int, typer.Option(min=1, help="Images per tar.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Decides which images share a tar, and their order in it.")] = 0,
    min_side_px: Annotated[int, typer.Option(min=1, help="Images with a shorter side are rejected.")] = 64,
    max_pixels: Annotated[int, typer.Option(min=1, max=MAX_PIXELS, help="Images of more are rejected.")] = MAX_PIXELS,
    sub_image_px: Annotated[
        int | None, typer.Option(min=1, help="Cut images into PNG crops of this side, as DF2K's; else they stay as is.")
    ] = None,
    sub_image_step_px: Annotated[int, typer.Option(min=1, help="Pixels from one such crop to the next.")] = 240,
    drop_duplicates: Annotated[bool, typer.Option(help="Of files with the same bytes keep one.")] = True,
    max_reject_share: Annotated[float, typer.Option(min=0, max=1, help="More rejects are an error.")] = 0.01,
    include: Annotated[list[str] | None, typer.Option(help="Glob on the path or file name; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of images left out; repeatable.")] = None,
    grow: Annotated[
        bool,
        typer.Option("--grow/--anew", help="Of a finished set keep the shards and add new images, or make it anew."),
    ] = True,
    address: Address = None,
    debug: Debug = False,
) -> None:
    """Make the shards of a source, or complete those of a stopped run; a finished set grows by what is new."""
    from pydantic import ValidationError

    from data_prep import storage
    from data_prep.shard import ShardSettings, make_shards
    from pipeline import cluster
    from pipeline.config import ComputeConfig
    from pipeline.progress import Display

    try:
        settings = ShardSettings(
            samples_per_shard=samples_per_shard,
            seed=seed,
            min_side_px=min_side_px,
            max_pixels=max_pixels,
            drop_duplicates=drop_duplicates,
            sub_image_px=sub_image_px,
            sub_image_step_px=sub_image_step_px,
            max_reject_share=max_reject_share,
        )
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    storage.check_writable(uri)
    with cluster.connected(ComputeConfig(), address, debug), Display(console()) as display:
        display.begin_stage(1, 1, "shards", f"{source} to {uri}")
        made = make_shards(
            source,
            uri,
            settings,
            include=include or [],
            exclude=exclude or [],
            progress=lambda done, total: display.update(done, total, "shards"),
            say=lambda text: display.say(f"      {text}"),
            grow=grow,
        ).index
        display.end_stage(
            f"{made.num_samples} samples in {len(made.shards)} shards, {made.num_rejects} rejects, "
            f"{made.num_duplicates} duplicates"
        )
