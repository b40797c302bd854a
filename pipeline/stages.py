"""What each kind of stage does: plain functions from finished inputs to a published artifact."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mlflow.entities.model_registry import ModelVersion

from data_prep import storage
from data_prep.image_files import PassedOver
from data_prep.index import INDEX_NAME
from data_prep.mix import MIX_NAME, Mix, MixPart
from data_prep.shard import ShardSettings, make_shards
from model import build
from model.weights import UNTOLD, load_parameters, read_weights, save_network
from pipeline import artifact as artifacts
from pipeline import cascade, checkpoint, lineage, pictures, promotion, registry, report
from pipeline.artifact import Artifact
from pipeline.benchmark import read_pair
from pipeline.config import DataConfig, Recipe, digest_of
from pipeline.evaluate import SetResult, Weights, evaluate, judges
from pipeline.gate import Verdict
from pipeline.launch import TrainJob, run_training
from pipeline.lock import StorageLock
from pipeline.monitor import Record
from pipeline.plan import VERSIONS, Stage
from pipeline.progress import Display
from pipeline.published import preset_of
from pipeline.rivals import judge_candidate
from pipeline.system_summary import SystemSummary
from pipeline.tracking import Tracker, warning_tags
from pipeline.validate import ImagePair, read_best

SAFETENSORS, PTH = "weights.safetensors", "weights.pth"
RESULTS = "results.json"
_NOTED = {"loss": "loss {:.5f}", "images_per_s": "{:.1f} images/s"}


@dataclass
class Work:
    """What a stage function is given."""

    recipe: Recipe
    stage: Stage
    inputs: dict[str, Artifact]
    finished: dict[str, Artifact]
    fingerprint: str
    run_id: str
    tracker: Tracker
    display: Display
    folder: Path
    lock: StorageLock

    @property
    def place(self) -> str:
        """Where this stage's artifact goes."""
        return artifacts.place(self.recipe.storage.uri, self.stage.name, self.fingerprint)

    def publish(self, files: dict[str, Path], info: dict[str, Any], digest: str | None = None) -> Artifact:
        """Publish the stage's artifact when its MLflow run is complete and ended: what is done lacks nothing."""

        def tell(made: Artifact) -> None:
            self.tracker.log_files(self.run_id, files)
            self.tracker.set_tags(self.run_id, {"hatchery.artifact": made.uri, "hatchery.digest": made.digest})
            self.tracker.finish(self.run_id)

        return artifacts.publish(
            self.recipe.storage.uri,
            self.stage.name,
            self.fingerprint,
            inputs={name: found.digest for name, found in self.inputs.items()},
            config=self.stage.config,
            local_files=files,
            info=info,
            digest=digest,
            before_marker=tell,
            # a mix is looked for by its name, and is the same whoever writes it
            token="" if self.stage.kind == "mix" else self.lock.token,
            check=self.lock.check,
        )


def run_shard(work: Work) -> Artifact:
    """Images -> WebDataset tars and their index."""
    data = work.recipe.data[work.stage.name.removeprefix("shard-")]
    shards = make_shards(
        data.source,
        work.place,
        shard_settings(data, work.recipe.seed),
        include=list(data.include),
        exclude=list(data.exclude),
        progress=lambda done, total: work.display.update(done, total, "shards"),
        say=lambda text: work.display.say(f"      {text}"),
    )
    index = work.folder / INDEX_NAME
    storage.download(storage.join(work.place, INDEX_NAME), index)
    found = shards.index
    info = {
        "images": found.num_samples,
        "shards": len(found.shards),
        "rejects": found.num_rejects,
        "duplicates": found.num_duplicates,
        "bytes": found.num_bytes,
    }
    work.tracker.log_metrics(work.run_id, {key: float(value) for key, value in info.items()})
    work.tracker.log_files(work.run_id, {INDEX_NAME: index})
    return work.publish({}, info, digest=shards.digest)


def shard_settings(data: DataConfig, seed: int) -> ShardSettings:
    """How a recipe's set is sharded."""
    return ShardSettings(
        samples_per_shard=data.samples_per_shard,
        seed=seed,
        min_side_px=data.min_side_px,
        max_pixels=data.max_pixels,
        drop_duplicates=data.drop_duplicates,
        sub_image_px=data.sub_image_px,
        sub_image_step_px=data.sub_image_step_px,
        max_reject_share=data.max_reject_share,
    )


def run_mix(work: Work) -> Artifact:
    """Sets of shards -> a small file that has them served together by shares."""
    root = storage.normalise(work.recipe.storage.uri)
    parts = []
    for part in work.recipe.mixes[work.stage.name.removeprefix("mix-")]:
        sets = [work.inputs[f"shard-{name}"].uri.removeprefix(f"{root}/") for name in part.data]
        parts.append(MixPart(sets=tuple(sets), share=part.share))
    path = work.folder / MIX_NAME
    path.write_text(Mix(parts=tuple(parts)).model_dump_json(indent=1))
    served = [VERSIONS["mix"], work.stage.config, {name: found.digest for name, found in work.inputs.items()}]
    digest = digest_of(served)  # of the samples in their order, not of the file
    return work.publish({path.name: path}, {"parts": len(parts)}, digest=digest)


def run_train(work: Work) -> Artifact:
    """Shards and perhaps weights to start from -> averaged weights of a trained network."""
    training = work.recipe.trainings[work.stage.name]
    phase = work.recipe.phases[training.phase]
    shards, *starts = work.inputs.values()
    job = TrainJob(
        name=work.stage.name,
        model=work.recipe.model,
        phase=phase,
        training=training.model_copy(update={"init_from": None, "init_weights": None}),
        compute=work.recipe.compute,
        seed=work.recipe.seed,
        shards_uri=shards.uri,
        init=starts[0] if starts else None,
        validation=work.recipe.validation,
        gate_metric=work.recipe.registry.gate.validation_metric,
        checkpoints_uri=storage.join(work.place, "checkpoints"),
        patience_s=work.recipe.storage.patience_s,
    )
    last: dict[str, float] = {}
    images = _validation_images(work, training.scale)
    saved = run_training(job, _training_records(work, last), images, work.lock.check)
    lineage = {"trained_on": shards.digest, "started_from": starts[0].digest if starts else training.start}
    info: dict[str, Any] = {"scale": training.scale, "steps": checkpoint.steps_of(saved), **last}
    best = read_best(storage.join(job.checkpoints_uri, "best"), work.folder) if job.validation.every else None
    weights = checkpoint.ema_weights(saved)
    if best is not None:
        info["best"] = best[1].model_dump()
        weights = best[0] if job.validation.export == "best" else weights
    return work.publish(_export(weights, work, training.scale, lineage), info)


def _validation_images(work: Work, scale: int) -> list[ImagePair] | None:
    """The first images of the gate's set as pairs of a scale, if the recipe wants validations."""
    wanted, recipe = work.recipe.validation, work.recipe
    if not wanted.every:
        return None
    name = recipe.registry.gate.validation_set
    images = recipe.evaluate.images(name, scale)
    pairs = [(image.name, read_pair(image, scale)) for image in images[: wanted.max_images]]
    return [(name, pair.low_res, pair.high_res) for name, pair in pairs]


def _training_records(work: Work, last: dict[str, float]) -> Callable[[Record], None]:
    """What becomes of the ranks' records: MLflow, the progress bar, and the last metrics for the artifact."""
    cluster, steps, bad_steps = SystemSummary(), 0, 0

    def handle(record: Record) -> None:
        nonlocal steps, bad_steps
        steps = record.get("steps", steps)
        step, say = record["step"], f"      {work.stage.name}: "
        if "params" in record:
            used = record["params"]
            work.tracker.tag_later(work.run_id, {f"hatchery.{key}": str(value) for key, value in used.items()})
            plural = "" if used["workers_used"] == 1 else "es"
            how = f"{used['precision_used']} on {used['device'].partition(':')[0]}"
            work.display.say(f"{say}{used['workers_used']} process{plural} from step {step}, {how}")
        if "warning" in record:
            work.display.say(say + record["warning"])
            work.tracker.tag_later(work.run_id, warning_tags(step, record["warning"]))
        if "bad_step" in record:
            bad_steps += 1
            work.display.say(say + record["bad_step"]["said"])
            content = json.dumps(record["bad_step"], indent=1).encode()
            work.tracker.log_bytes_later(work.run_id, f"bad-steps/step-{step:08d}.json", content)
            work.tracker.log_metrics(work.run_id, {"bad_steps": bad_steps}, step)
        if "settled" in record:
            work.display.say(f"{say}{record['settled']} steps in all, as measured until step {step}")
            work.tracker.tag_later(work.run_id, {"hatchery.steps": str(record["settled"])})
        if "system" in record and (found := cluster.add(record["system"], step, steps)):
            work.tracker.log_metrics(work.run_id, found, step)
        for name, content in record.get("pictures", {}).items():
            work.tracker.log_bytes_later(work.run_id, f"validation/step-{step:08d}/{name}", content)
        for name, uri in record.get("files", {}).items():
            work.tracker.log_stored_later(work.run_id, name, uri)
        if metrics := record.get("metrics", {}):
            last.update(metrics)
            work.tracker.log_metrics(work.run_id, metrics, step)
            if looked := _validation_of(metrics):
                work.display.say(f"{say}step {step}, {looked}")
                return
            note = ", ".join(pattern.format(metrics[key]) for key, pattern in _NOTED.items() if key in metrics)
            work.display.update(step, record["steps"], "steps", note)

    return handle


def _validation_of(metrics: dict[str, float]) -> str:
    """What a validation found, in words; empty for metrics of none. It is said by itself: a bar would pass over it."""
    shown = {"validation_psnr_y": "validation {:.3f} dB", "validation_ssim_y": "SSIM {:.4f}"}
    return ", ".join(pattern.format(metrics[key]) for key, pattern in shown.items() if key in metrics)


def _export(weights: dict[str, torch.Tensor], work: Work, scale: int, lineage: dict[str, str]) -> dict[str, Path]:
    """Averaged weights as published .pth and .safetensors files."""
    network = build(work.recipe.model.arch, scale, **work.recipe.model.options)
    load_parameters(network, weights)
    origin = {"recipe": work.recipe.name, "stage": work.stage.name, "fingerprint": work.fingerprint, **lineage}
    files = {PTH: work.folder / PTH, SAFETENSORS: work.folder / SAFETENSORS}
    save_network(files[PTH], network)
    save_network(files[SAFETENSORS], network, **origin)
    return files


def run_cascade(work: Work) -> Artifact:
    """Weights of one scale (or published ones) -> a start for another."""
    training = work.recipe.trainings[work.stage.name.rsplit("-to-", 1)[1]]
    if work.inputs:
        (source,) = work.inputs.values()
        path, origin = artifacts.fetch(source, SAFETENSORS, work.folder), source.digest
    else:
        assert training.init_weights is not None
        path, origin = (
            cascade.fetch_published(training.init_weights, work.folder, work.recipe),
            training.init_weights,
        )
    network, transferred = cascade.start_network(
        read_weights(path), origin, work.recipe.model, training.scale, training.seed, work.recipe.cascade.tail
    )
    files = _export(network.state_dict(), work, training.scale, {"started_from": origin})
    keys = work.folder / "keys.json"
    keys.write_text(json.dumps(transferred, indent=1))
    copied = sum(what == "copied" for what in transferred.values())
    return work.publish({**files, keys.name: keys}, {"keys": len(transferred), "copied": copied})


def run_evaluate(work: Work) -> Artifact:
    """Trained networks -> figures on every set, beside bicubic, with pictures of the worst and best images."""
    asked = work.recipe.evaluate
    results: list[SetResult] = []
    shown: dict[str, Path] = {}
    archs: dict[str, str | None] = {}
    with judges(work.recipe.compute) as pool:
        for name, trained in work.inputs.items():
            scale = work.recipe.trainings[name].scale
            path = artifacts.fetch(trained, PTH, work.folder)
            weights = Weights.put(path.read_bytes(), load_options(work.recipe))
            archs[name] = preset_of(read_weights(path))
            for set_name in asked.sets:
                passed_over = PassedOver()
                images = asked.images(set_name, scale, passed_over)
                if said := passed_over.describe():
                    work.display.say(f"      {set_name}: {said}")
                judged = evaluate(pool, name, scale, weights, set_name, images, asked.protocol)
                results.append(judged.result)
                shown |= pictures.write_pictures(judged, images, asked.pictures, work.folder)
                work.tracker.log_metrics(work.run_id, _metrics_of(judged.result))
                work.display.update(len(results), len(asked.sets) * len(work.inputs), "evaluations")
    files = write_reports(results, archs, work.folder)
    return work.publish(files | shown, {}, digest=digest_of([result.what() for result in results]))


def _metrics_of(result: SetResult) -> dict[str, float]:
    keys = [*result.protocol.metrics, *(f"bicubic_{metric}" for metric in result.protocol.metrics)]
    return {f"{key}.{result.set}.x{result.scale}": getattr(result, key) for key in keys}


def write_reports(results: list[SetResult], archs: dict[str, str | None], folder: Path) -> dict[str, Path]:
    """Results as files below `folder`: JSON, CSV by set and by image, tables."""
    tables = report.as_text(report.table(results), report.published_table(results, archs))
    contents = {
        RESULTS: report.as_json(results),
        "results.csv": report.as_csv(results),
        "images.csv": report.images_csv(results),
        "table.txt": tables,
    }
    for name, text in contents.items():
        (folder / name).write_text(text)
    return {name: folder / name for name in contents}


def load_options(recipe: Recipe) -> dict[str, Any]:
    """The model options that `model.load` cannot read off the weights."""
    return {key: value for key, value in recipe.model.options.items() if key in ("num_heads", *UNTOLD)}


def run_register(work: Work) -> Artifact:
    """Trained networks and their figures -> registered models, a version each, called `candidate`."""
    evaluation = work.inputs["evaluate"]
    results = read_results(evaluation, work.folder)
    versions = {}
    for name in work.recipe.final_trainings:
        scale = work.recipe.trainings[name].scale
        mine = [result for result in results if result.model == name]
        tags = {
            registry.CONTENT_TAG: digest_of([work.inputs[name].digest, evaluation.digest]),
            registry.SCALE_TAG: str(scale),
            "hatchery.recipe": work.recipe.name,
            "hatchery.training": name,
            "hatchery.weights": work.inputs[name].file_uri(PTH),
            **lineage.tags(work.recipe, name, work.finished),
            **registry.metric_tags(mine),
        }
        model = registry.model_name(work.recipe.registry, scale)
        with tempfile.TemporaryDirectory(dir=work.folder) as folder:
            files = _carried(work, name, mine, Path(folder))
            made = registry.register(work.tracker.client, work.run_id, model, files, load_options(work.recipe), tags)
        for data, shards in lineage.data_behind(name, work.finished).items():
            work.tracker.log_dataset(work.run_id, data, shards.digest, shards.uri)
        versions[model] = {
            "version": str(made.version),
            "training": name,
            "content": tags[registry.CONTENT_TAG],
        }
        work.display.update(len(versions), len(work.recipe.final_trainings), "models")
    return work.publish(
        {},
        {"versions": versions, "tracking_uri": work.tracker.uri},
        digest=digest_of([work.tracker.uri, versions]),
    )


def _carried(work: Work, name: str, mine: list[SetResult], folder: Path) -> dict[str, Path]:
    """What a model version carries: weights in both layouts, the figures, the recipe, the lineage."""
    files = {file: folder / file for file in (PTH, SAFETENSORS, registry.EVALUATION, registry.RECIPE, "lineage.json")}
    for file in (PTH, SAFETENSORS):
        os.replace(artifacts.fetch(work.inputs[name], file, folder), files[file])
    files[registry.EVALUATION].write_text(report.as_json(mine))
    files[registry.RECIPE].write_text(work.recipe.model_dump_json(indent=1))
    files["lineage.json"].write_text(lineage.as_json(name, work.finished))
    return files


def run_promote(work: Work) -> Artifact:
    """Candidates -> champions, where the gate lets them."""
    results = read_results(work.inputs["evaluate"], work.folder)
    asked, rule, anchor = work.recipe.evaluate, work.recipe.registry.gate, work.recipe.registry.anchor
    decisions = {}
    for model, made in work.inputs["register"].info["versions"].items():
        mine = [result for result in results if result.model == made["training"]]
        candidate = work.tracker.client.get_model_version(model, made["version"])

        def judge(
            champion: ModelVersion | None, mine: list[SetResult] = mine, candidate: ModelVersion = candidate
        ) -> Verdict:
            return judge_candidate(mine, candidate, champion, rule, asked, anchor, work.recipe.compute)

        decisions[model] = promotion.promote(work.tracker.client, model, candidate, judge).model_dump()
    path = work.folder / "decisions.json"
    path.write_text(json.dumps(decisions, indent=1))
    return work.publish({path.name: path}, {"decisions": decisions})


def read_results(evaluation: Artifact, folder: Path) -> list[SetResult]:
    """The results that an evaluate stage published."""
    return report.from_json(artifacts.fetch(evaluation, RESULTS, folder).read_bytes())


def is_current(stage: Stage, found: Artifact, tracker: Tracker) -> bool:
    """Whether a finished artifact still holds: registered versions must be in the server that is used now."""
    if stage.kind != "register":
        return True
    return found.info["tracking_uri"] == tracker.uri and all(
        registry.find_version(tracker.client, model, made["content"]) is not None
        for model, made in found.info["versions"].items()
    )


RUN: dict[str, Callable[[Work], Artifact]] = {
    "shard": run_shard,
    "mix": run_mix,
    "train": run_train,
    "cascade": run_cascade,
    "evaluate": run_evaluate,
    "register": run_register,
    "promote": run_promote,
}
