"""Retraining on a domain: what is new since last time is sharded, the champion fine-tuned on it, judged and gated.

python pipeline/retrain.py DOMAIN.yaml          (or: hatchery retrain DOMAIN.yaml)
ray job submit --working-dir . -- python pipeline/retrain.py DOMAIN.yaml

Each call either continues the round that is open, or opens one where enough images are new, or says that nothing is
to be done. A round is a recipe of its own, so that everything of the main job holds: finished stages are skipped, a
killed training goes on from its checkpoint, figures and versions are in MLflow.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__" and sys.path[0] != str(ROOT):
    # Run as a script, Python looks for modules in pipeline/ itself: look in the project instead.
    sys.path[0] = str(ROOT)

import datetime  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from contextlib import ExitStack  # noqa: E402
from typing import Any  # noqa: E402

from mlflow import MlflowClient  # noqa: E402
from mlflow.entities.model_registry import ModelVersion  # noqa: E402
from pydantic import ValidationError  # noqa: E402
from rich.console import Console  # noqa: E402

from data_prep import sources, storage  # noqa: E402
from data_prep.degrade import check  # noqa: E402
from data_prep.image_files import PassedOver  # noqa: E402
from data_prep.layouts import training_items  # noqa: E402
from data_prep.uri import printable  # noqa: E402
from model.weights import read_weights, recognise  # noqa: E402
from pipeline import pretrain, registry, tracking  # noqa: E402
from pipeline.config import (  # noqa: E402
    ConfigError,
    DataConfig,
    MixPartConfig,
    ModelConfig,
    Recipe,
    RegistryConfig,
    TrainingConfig,
    tracking_uri,
)
from pipeline.domain import MIX, PHASE, DomainConfig  # noqa: E402
from pipeline.held_out import judging_among, judging_images, patterns_of_judging  # noqa: E402
from pipeline.lasting import check_lasting  # noqa: E402
from pipeline.ledger import Ledger, NewImage, Round, with_roles  # noqa: E402
from pipeline.lock import LockedError, StorageLock  # noqa: E402
from pipeline.settings import explain  # noqa: E402
from pipeline.survey import Choice  # noqa: E402

DAY_S = 86_400


def run(
    domain: DomainConfig, console: Console, address: str | None = None, debug: bool = False, now: bool = False
) -> dict[str, Any] | None:
    """Continue, begin or decline a retraining; what was decided, None where nothing was to be done.

    now: retrain on whatever is new, however little.
    """
    say = _speaker(console)
    check_lasting(domain)
    storage.check_writable(domain.storage.uri)
    ledger = Ledger(domain.storage.uri, domain.name)
    with ExitStack() as stack:
        try:
            lock = StorageLock(storage.join(ledger.uri, "retrain.lock"), f"retraining of {domain.name}", say)
            stack.enter_context(lock)
        except LockedError as error:
            say(f"{domain.name}: leaving it to another run: {error}")
            return None
        client = tracking.connect_default(tracking_uri(domain))
        planned = _plan(domain, ledger, client, now, say)
        if planned is None:
            return None
        rounds, opened = planned
        # before the round is opened: what is wrong with the config must not leave one that cannot be finished
        recipe = round_recipe(domain, ledger, client, rounds, say)
        if not opened:
            ledger.open(rounds[-1])
        finished = pretrain.run(recipe, Choice(), console, address, debug)
        (decision,) = finished["promote"].info["decisions"].values()
        outcome = {"round": rounds[-1].number, "start": rounds[-1].start, **decision}
        ledger.close(rounds[-1].number, outcome)
        return outcome


def _plan(
    domain: DomainConfig, ledger: Ledger, client: MlflowClient, now: bool, say: Callable[[str], None]
) -> tuple[list[Round], bool] | None:
    """All rounds, of which the last is to be run, and whether that one is open already; None: nothing is to be done.

    What is to be done and why is said.
    """
    rounds = ledger.rounds()
    if rounds and ledger.outcome(rounds[-1].number) is None:
        say(f"{domain.name}: round {rounds[-1].number} was interrupted, continuing it")
        return rounds, True
    images = _choose_images(domain, ledger, rounds, now, say)
    if images is None:
        return None
    start = _start_version(domain, client)
    planned = Round(
        number=rounds[-1].number + 1 if rounds else 1,
        start=f"models:/{start.name}/{start.version}",
        opened=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        images=tuple(images),
    )
    num_held = _num_held(images)
    say(
        f"{domain.name}: round {planned.number} with {len(images) - num_held} new images to train on and {num_held} "
        f"held out, from {planned.start}"
    )
    return [*rounds, planned], False


def _choose_images(
    domain: DomainConfig, ledger: Ledger, rounds: list[Round], now: bool, say: Callable[[str], None]
) -> list[NewImage] | None:
    """The images of a new round with their roles, if enough is new; None, having said so, if not."""
    passed_over = PassedOver()
    new, unusable = ledger.new_images(_arrived(domain, passed_over), domain.min_side_px)
    if said := passed_over.describe():
        say(f"{domain.name}: {said}")
    if unusable:
        say(f"{domain.name}: {unusable} files cannot be used (damaged, or a side below {domain.min_side_px} px)")
    waited_days = ledger.waited_s(new) / DAY_S
    overdue = domain.max_wait_days is not None and bool(new) and waited_days >= domain.max_wait_days
    if not new or not (now or overdue or len(new) >= domain.min_new_images):
        needed = f", {domain.min_new_images} make a retraining worthwhile" if new else ""
        say(f"{domain.name}: {len(new)} new images{needed}: nothing to do")
        return None
    held_before = sum(_num_held(entry.images) for entry in rounds)
    judging = judging_among(new, judging_images(domain.storage.uri, domain.evaluate))
    if judging:
        say(f"{domain.name}: {len(judging)} new images judge already, in another domain or a benchmark: held out")
    images = with_roles(new, domain.hold_out_share, domain.min_hold_out - held_before, judging)
    if _num_held(images) == len(images):
        say(
            f"{domain.name}: all {len(images)} new images are held out for judgement, none is left to train on: waiting"
        )
        return None
    return images


def _num_held(images: Sequence[NewImage]) -> int:
    return sum(image.role == "hold-out" for image in images)


def _arrived(domain: DomainConfig, passed_over: PassedOver) -> list[sources.Item]:
    """What lies at the domain's source now; an empty folder is no error here."""
    try:
        return list(training_items(domain.source, list(domain.include), list(domain.exclude), passed_over))
    except sources.NoImagesError:
        if _is_there(domain.source):
            return []
        raise


def _is_there(source: str) -> bool:
    return not storage.is_local(source) or Path(storage.normalise(source)).exists()


def _start_version(domain: DomainConfig, client: MlflowClient) -> ModelVersion:
    """What is fine-tuned: the champion of the model that results are registered as, else the base."""
    base = registry.resolve(client, domain.base)
    if domain.registered_as and domain.registered_as != base.name:
        own = registry.by_alias(client, domain.registered_as, "champion")
        return own or base
    return base


def round_recipe(
    domain: DomainConfig, ledger: Ledger, client: MlflowClient, rounds: list[Round], say: Callable[[str], None]
) -> Recipe:
    """The recipe of the last round: all rounds' images mixed with replay, from the version the round starts from.

    How many images are left out because they judge is said. ConfigError, in the domain's words, where the domain does
    not fit the network that it starts from.
    """
    start = registry.resolve(client, rounds[-1].start)
    model, scale = _model_of(start)
    _check(domain, scale)
    new, replay = _training_data(domain, ledger, rounds, say)
    share = domain.replay.share
    mix = (MixPartConfig(data=tuple(new), share=1 - share), MixPartConfig(data=("replay",), share=share))
    training = TrainingConfig(scale=scale, phase=PHASE, init_weights=rounds[-1].start)
    sets = {domain.name: ledger.hold_out_uri, **domain.evaluate.sets}
    try:
        return Recipe(
            name=f"retrain-{domain.name}",
            seed=domain.seed,
            storage=domain.storage,
            tracking=domain.tracking,
            compute=domain.compute,
            model=model,
            data=new | {"replay": replay},
            mixes={MIX: mix},
            phases={PHASE: domain.training.model_copy(update={"degradation": domain.degradation})},
            trainings={_data_name(domain, rounds[-1]): training},
            evaluate=domain.evaluate.model_copy(update={"sets": sets}),
            registry=RegistryConfig(
                name=_registry_name(domain, start, scale), gate=domain.gate, anchor=rounds[0].start
            ),
        )
    except ValidationError as error:
        faults = explain(Recipe, f"domain {domain.name}", error)
        raise ConfigError(faults.replace(f"phases.{PHASE}.", "training.").replace("registry.gate", "gate")) from error


def _training_data(
    domain: DomainConfig, ledger: Ledger, rounds: list[Round], say: Callable[[str], None]
) -> tuple[dict[str, DataConfig], DataConfig]:
    """Each round's images by name, and the replay, both without what judges now, whoever holds it out since when."""
    shared: dict[str, Any] = {"samples_per_shard": domain.samples_per_shard, "min_side_px": domain.min_side_px}
    judging = judging_images(domain.storage.uri, domain.evaluate, rounds[-1])
    new, left_out = {}, 0
    for entry in rounds:
        images = [image for image in entry.images if image.role == "train"]
        held = judging_among(images, judging)
        left_out += len(held)
        if len(held) < len(images):
            exclude = tuple(f"/{image.sha256}.{image.ext}" for image in images if image.sha256 in held)
            source = ledger.train_uri(entry.number)
            new[_data_name(domain, entry)] = DataConfig(source=source, exclude=exclude, max_reject_share=0, **shared)
    if not new:
        raise ValueError(f"{domain.name}: all images of its rounds are held out elsewhere: remove them there or here")
    old = domain.replay
    replayed = patterns_of_judging(old.source, old.include, old.exclude, judging)
    if left_out or replayed:
        say(f"{domain.name}: {left_out} images of its rounds and {len(replayed)} of the replay judge now: left out")
    shared |= {"max_reject_share": domain.max_reject_share}
    return new, DataConfig(source=old.source, include=old.include, exclude=(*old.exclude, *replayed), **shared)


def _data_name(domain: DomainConfig, entry: Round) -> str:
    return f"{domain.name}-{entry.number:04}"


def _check(domain: DomainConfig, scale: int) -> None:
    """ValueError for images that may be too small, and for sets that cannot judge this scale."""
    for name in domain.evaluate.sets:
        domain.evaluate.images(name, scale)
    if scale == 1 and not domain.evaluate.degrade.get(domain.name):
        raise ConfigError(
            f"domain {domain.name}: at x1 its hold-out must be degraded to be judged: list the steps in "
            f"evaluate.degrade.{domain.name}"
        )
    try:
        check(domain.degradation, scale)
    except ValueError as error:
        raise ConfigError(f"domain {domain.name}: {error}") from error
    needed_px = domain.training.patch_px * scale
    if domain.min_side_px < needed_px:
        raise ConfigError(
            f"domain {domain.name}: min_side_px {domain.min_side_px} lets in images that hold no crop of "
            f"training.patch_px {domain.training.patch_px} at x{scale}: raise it to {needed_px}, or use smaller crops"
        )


def _model_of(version: ModelVersion) -> tuple[ModelConfig, Any]:
    """The network of a registered version, as a recipe says it, and its scale."""
    with tempfile.TemporaryDirectory(prefix="hatchery-") as folder:
        found = recognise(read_weights(registry.fetch(version, "weights.pth", Path(folder))))
        options = registry.read_options(version, Path(folder))
    arch, scale = found.pop("arch"), found.pop("scale")
    return ModelConfig(arch=arch, options=found | options), scale


def _registry_name(domain: DomainConfig, start: ModelVersion, scale: int) -> str:
    """The registered model's name without the scale that is appended to it."""
    name = domain.registered_as or start.name
    if not name.endswith(f"-x{scale}"):
        raise ValueError(
            f"registered model {name!r} upscales x{scale}: set registered_as to a name that ends in -x{scale}"
        )
    return name.removesuffix(f"-x{scale}")


def dry_run(domain: DomainConfig, console: Console, now: bool = False) -> None:
    """Say what a call would do, and what is wrong with the config; writes down no more than which files it saw when."""
    say = _speaker(console)
    ledger = Ledger(domain.storage.uri, domain.name)
    client = tracking.connect_default(tracking_uri(domain))
    planned = _plan(domain, ledger, client, now, say)
    if planned is not None:
        recipe = round_recipe(domain, ledger, client, planned[0], say)
        say(f"{domain.name}: a call would train {recipe.phases[PHASE].length}, judge and gate")


def _speaker(console: Console) -> Callable[[str], None]:
    """What prints a line as it is."""
    return lambda text: console.print(printable(text), soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    from pipeline.cli import main

    main(["retrain", *sys.argv[1:]])
