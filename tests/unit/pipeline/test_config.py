"""Recipes: every shipped one parses, overrides apply, and each fault is one clear line."""

from pathlib import Path

import pytest

from pipeline.config import CONFIGS, ConfigError, Recipe, flatten, load_recipe, tracking_uri
from pipeline.launch import TrainJob
from pipeline.plan import Outside, stages_of
from pipeline.stages import shard_settings

RECIPES = sorted(path.stem for path in (CONFIGS / "recipe").glob("[!_]*.yaml"))
PUBLISHED = [name for name in RECIPES if not name.startswith(("demo", "own"))]
SCALES = {key: {1} for key in ("denoise", "jpeg", "deblur", "denoise_unet", "demo_denoise")} | {
    "real": {4},
    "real_gan": {4},
    "own_photographs": {2},
}


def demo(*overrides: str) -> Recipe:
    return load_recipe("demo", list(overrides))


def test_the_named_recipes_are_shipped() -> None:
    assert {"demo", "hat_s", "hat", "hat_l", "hmanet"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_parses_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert {recipe.trainings[final].scale for final in recipe.final_trainings} == SCALES.get(name, {2, 3, 4})
    header = (CONFIGS / "recipe" / f"{name}.yaml").read_text().split("extends")[0]
    assert "--recipe" in header
    assert "Cost" in header


def test_sets_are_checked_at_the_scales_that_look_at_them() -> None:
    noise = "evaluate.degrade.held-out=[{step: noise, sigma: 9}]"
    x1 = ["trainings.last={scale: 1, phase: finetune, init_from: finetune-x2}", "evaluate.models=[last]"]
    x1 += ["phases.finetune.degradation=[{step: noise, sigma: 9}]"]
    only_x1 = [f"trainings.{name}.phase=pretrain" for name in ("finetune-x2", "finetune-x3", "finetune-x4")]
    demo(*x1, *only_x1, noise)  # the x2 trainings before it never look at the set
    with pytest.raises(ConfigError, match=r"evaluate.degrade.held-out: .* at scale [234] it needs one"):
        demo(*x1, *only_x1, noise, "validation.every=5")


def test_the_best_weights_are_of_what_they_were_chosen_by() -> None:
    def configs(sigma: int) -> dict[str, object]:
        steps = f"evaluate.degrade.held-out=[{{step: shrink}}, {{step: noise, sigma: {sigma}}}]"
        recipe = demo("validation={every: 5, export: best}", steps)
        outside = Outside(dict.fromkeys(recipe.data, "v"), dict.fromkeys(recipe.evaluate.sets, "v"), {})
        return {stage.name: stage.config for stage in stages_of(recipe, outside)}

    assert configs(5)["pretrain-x2"] == configs(5)["pretrain-x2"] != configs(9)["pretrain-x2"]


def test_only_data_that_something_trains_on_is_used() -> None:
    assert load_recipe("hat_s").used_data == {"df2k"}  # it inherits phases on ImageNet
    assert load_recipe("hat").used_data == {"df2k", "imagenet"}
    assert load_recipe("hat", ["trainings.finetune-x4.phase=pretrain"]).used_data == {"df2k", "imagenet"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_keep_the_papers_schedules(name: str) -> None:
    recipe = load_recipe(name)
    assert {phase.global_batch for phase in recipe.phases.values()} == {32}
    trained = {recipe.phases[training.phase].patch_px for training in recipe.trainings.values()}
    assert trained == ({128} if SCALES.get(name) == {1} else {64})
    pretrain, finetune = recipe.phases["pretrain"], recipe.phases["finetune"]
    assert (pretrain.steps, pretrain.lr, pretrain.ema_decay) == (800_000, 2e-4, 0.999)
    assert finetune.lr == (5e-6 if name == "hmanet" else 1e-5)
    assert pretrain.milestones == (300_000, 500_000, 650_000, 700_000, 750_000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_look_at_themselves_and_wait_for_gpus(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.validation.every == 5000
    assert recipe.registry.gate.validation_set in recipe.evaluate.sets
    assert recipe.compute.use_gpu is True


def test_overrides_change_values_and_types() -> None:
    recipe = demo("phases.pretrain.steps=7", "evaluate.sets.Set5=/data/Set5", "compute.zero_stage=2")
    assert recipe.phases["pretrain"].steps == 7
    assert recipe.evaluate.sets["Set5"] == "/data/Set5"
    assert recipe.compute.zero_stage == 2


def test_where_a_recipe_runs_is_not_what_it_is() -> None:
    elsewhere = demo("compute.num_workers=1", "storage.uri=s3://bucket/x", "tracking.uri=http://host:5000")
    assert elsewhere.digest == demo().digest
    assert demo("seed=1").digest != demo().digest


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("phases.pretrain.stepz=3", ["unknown key 'phases.pretrain.stepz'", "steps"]),
        ("compute.zero_stage=7", ["compute.zero_stage", "7"]),
        ("phases.pretrain.steps=many", ["phases.pretrain.steps", "many"]),
        ("trainings.pretrain-x3.init_from=pretrain-x4", ["pretrain-x4", "not an earlier training"]),
        ("trainings.pretrain-x3.phase=nope", ["nope", "pretrain, cascaded, finetune"]),
        ("trainings.pretrain-x2.init_weights=a.pth", ["exclude one another"]),
        ("phases.pretrain.data=imagenet", ["imagenet", "photographs"]),
        ("phases.pretrain.milestones=[5,3]", ["[5, 3]", "rise"]),
        ("compute.micro_batch=9", ["global_batch 8", "micro_batch 9"]),
        ("compute.micro_batch=all", ["micro_batch", "all"]),
        ("compute.num_workers=9", ["global_batch 8", "num_workers 9"]),
        ("compute.num_workers=[3,2]", ["num_workers [3, 2]", "swap"]),
        ("compute.cache_dir=cache", ["cache_dir 'cache'", "absolute path"]),
        ("data.sharp.sub_image_px=200", ["sub_image_step_px 240", "sub_image_px 200", "lower it"]),
        (
            "data={sharp: {source: x, sub_image_px: 120, sub_image_step_px: 60}}",
            ["data.sharp.sub_image_px 120", "trainings.finetune-x4", "at least 128"],
        ),
        ("compute={compile: true, zero_stage: 3}", ["compile does not go with zero_stage 3", "0, 1 or 2"]),
        ("compute.profile_steps=[5,2]", ["profile_steps [5, 2]", "first"]),
        ("validation.export=best", ["export 'best'", "set every"]),
        ("phases.pretrain.patch_px=30", ["30", "24"]),
        ("mixes.both=[{data: [photographs, nowhere], share: 1}]", ["mixes.both", "nowhere", "photographs, sharp"]),
        ("mixes.sharp=[{data: [photographs], share: 1}]", ["'sharp'", "another name"]),
        ("mixes.both=[{data: [sharp], share: 0}]", ["mixes.both", "share"]),
        ("registry.gate.better.Set99=0.1", ["Set99", "held-out"]),
        ("registry.gate.better=null", ["gate.better"]),
        ("registry.gate.not_worse.held-out=0.1", ["held-out", "keep one"]),
        ("registry.gate.not_worse.other=-1", ["not_worse.other -1", "gate.better"]),
        ("registry.gate.metric=psnr_rgb", ["psnr_rgb", "evaluate.protocol.rgb"]),
        ("evaluate.models=[nope]", ["nope", "finetune-x2"]),
        ("evaluate.models=[pretrain-x2,finetune-x2]", ["scale 2", "evaluate.models"]),
        ("evaluate.include.nope=[a]", ["nope", "held-out"]),
        ("trainings.finetune-x2.scale=1", ["trainings.finetune-x2", "changes nothing at scale 1: list steps"]),
        ("trainings.pretrain-x2-again.scale=1", ["trainings.pretrain-x2-again", "changes nothing at scale 1"]),
        ("phases.finetune.degradation=[{step: noise, sigma: 900}]", ["degradation.0.noise", "sigma 900", "0..255"]),
        ("phases.finetune.degradation=[{step: noise, sigma: 9}]", ["phases.finetune", "needs one, which makes"]),
        ("phases.finetune.degradation=bilinear", ["phases.finetune.degradation", "'bilinear'", "'bicubic'"]),
        ("phases.finetune.degradation=[]", ["phases.finetune", "degradation has no steps"]),
        ("evaluate.degrade.nope=[{step: shrink}]", ["evaluate.degrade 'nope'", "held-out"]),
        ("evaluate.degrade.held-out=[{step: noise, sigma: 1}]", ["evaluate.degrade.held-out", "shrink"]),
        ("model.options.upsampler=nearest", ["upsampler"]),
        ("model.options.num_heads=[5,5]", ["5"]),
        ("model.arch=edsr", ["edsr"]),
        ("name=Bad Name", ["name", "Bad Name"]),
    ],
)
def test_faults_name_the_value_and_what_would_do(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        demo(override)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


LOADER_OPTIONS = {
    "num_streams": 8,
    "crops_per_image": 2,
    "on_damage": "skip",
    "cache_decoded_bytes": 7,
    "cache_dir": "/cache",
    "cache_bytes": 9,
}


def test_a_recipes_options_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from pipeline.worker import pair_settings

    phase = [f"phases.pretrain.{key}={value}" for key, value in LOADER_OPTIONS.items() if not key.startswith("cache_")]
    recipe = demo(*phase, "phases.pretrain.cache_decoded_bytes=7", "compute.cache_dir=/cache", "compute.cache_bytes=9")
    training = recipe.trainings["pretrain-x2"]
    job = TrainJob(
        name="pretrain-x2",
        model=recipe.model,
        phase=recipe.phases["pretrain"],
        training=training,
        compute=recipe.compute,
        seed=3,
        shards_uri="s3://b/shards",
        init=None,
        checkpoints_uri="s3://b/checkpoints",
    )
    settings = pair_settings(job)
    assert settings.model_dump(include=set(LOADER_OPTIONS)) == LOADER_OPTIONS
    assert (settings.scale, settings.patch_px, settings.seed) == (2, 32, 3)


def test_a_recipes_options_reach_the_shards() -> None:
    options = {"drop_duplicates": False, "sub_image_px": 300, "sub_image_step_px": 100, "min_side_px": 90}
    data = demo(*(f"data.sharp.{key}={value}" for key, value in options.items())).data["sharp"]
    assert shard_settings(data, 3).model_dump(include=set(options)) == options
    assert set(type(shard_settings(data, 3)).model_fields) - set(type(data).model_fields) == {"seed"}


def test_df2k_is_cut_as_the_papers_cut_it() -> None:
    df2k = load_recipe("hat").data["df2k"]
    assert (df2k.sub_image_px, df2k.sub_image_step_px) == (480, 240)


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_faults_of_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no file; give a path or one of: deblur, demo"):
        load_recipe("nope")
    with pytest.raises(ConfigError, match="not of the form"):
        demo("steps")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(write(tmp_path, "a.yaml", "extends: a.yaml"))
    with pytest.raises(ConfigError, match="which is no file"):
        load_recipe(write(tmp_path, "b.yaml", "extends: absent.yaml"))
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_recipe(write(tmp_path, "c.yaml", "a: [1"))
    with pytest.raises(ConfigError, match="mapping"):
        load_recipe(write(tmp_path, "d.yaml", "- 1"))
    demo_file = CONFIGS / "recipe" / "demo.yaml"
    with pytest.raises(ConfigError, match="HATCHERY_ABSENT"):
        load_recipe(write(tmp_path, "e.yaml", f"extends: {demo_file}\nname: ${{oc.env:HATCHERY_ABSENT}}"))
    tiny = CONFIGS.parent / "tests" / "integration" / "_tiny.yaml"
    empty = write(tmp_path, "f.yaml", f"extends: {tiny}\ntrainings: {{}}")
    with pytest.raises(ConfigError, match="trainings is empty"):
        load_recipe(empty)


def test_flatten_gives_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": [2]}, "d": None}) == {"a.b": "1", "a.c": "[2]", "d": "None"}


def test_tracking_uri_is_the_recipes_or_the_environments_or_beside_local_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(demo("storage.uri=/x/runs")) == "sqlite:////x/runs/mlflow.db"
    with pytest.raises(ConfigError, match=r"tracking\.uri is not set"):
        tracking_uri(demo("storage.uri=s3://bucket/p"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://a:1")
    assert tracking_uri(demo("storage.uri=s3://bucket/p")) == "http://a:1"
    assert tracking_uri(demo("tracking.uri=http://b:2")) == "http://b:2"


def test_a_login_is_kept_for_use_and_dumped_nowhere() -> None:
    """Nor does it count: the recipe is the same by another password, and its copies can be used with the variables."""
    login = "tracking.uri=http://me:{}@mlflow:5000"
    odd = "evaluate.sets.held-out='https://host/x?token={}'"
    first, second = (load_recipe("demo", [login.format(word), odd.format(word)]) for word in ("hunter2", "hunter3"))
    assert first.tracking.uri == "http://me:hunter2@mlflow:5000"
    for dump in (str(first.model_dump()), str(first.model_dump(mode="json")), first.model_dump_json()):
        assert "hunter2" not in dump
    assert first.digest == second.digest
    copied = Recipe.model_validate_json(first.model_dump_json())
    assert (copied.tracking.uri, copied.digest) == ("http://mlflow:5000", first.digest)
