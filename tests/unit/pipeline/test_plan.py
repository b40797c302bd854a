"""The graph of a recipe as stages: order, fingerprints, choice."""

import pytest

from pipeline import plan
from pipeline.artifact import Artifact
from pipeline.config import Recipe, digest_of, load_recipe
from pipeline.plan import Outside, Stage


def outside(recipe: Recipe) -> Outside:
    return Outside(dict.fromkeys(recipe.data, "v1"), dict.fromkeys(recipe.evaluate.sets, "v1"), {})


def stages(*overrides: str) -> list[Stage]:
    recipe = load_recipe("demo", list(overrides))
    return plan.stages_of(recipe, outside(recipe))


def names(found: list[Stage]) -> list[str]:
    return [stage.name for stage in found]


def test_the_cascade_is_the_recipes_graph() -> None:
    assert names(stages()) == [
        "shard-photographs",
        "shard-sharp",
        "pretrain-x2",
        "cascade-pretrain-x2-to-pretrain-x3",
        "pretrain-x3",
        "cascade-pretrain-x3-to-pretrain-x2-again",
        "pretrain-x2-again",
        "cascade-pretrain-x3-to-pretrain-x4",
        "pretrain-x4",
        "finetune-x2",
        "finetune-x3",
        "finetune-x4",
        "evaluate",
        "register",
        "promote",
    ]
    by_name = {stage.name: stage for stage in stages()}
    assert by_name["finetune-x2"].inputs == ("shard-sharp", "pretrain-x2-again")
    assert by_name["evaluate"].inputs == ("finetune-x2", "finetune-x3", "finetune-x4")


def test_scale_1_names_its_head_unless_it_is_the_one_that_all_had_once() -> None:
    """Artifacts from before the choice still count: networks with upscaling, U-shaped and explicitly residual ones."""

    def heads(name: str, *overrides: str) -> list[object]:
        recipe = load_recipe(name, list(overrides))
        found = plan.stages_of(recipe, outside(recipe))
        return [stage.config.get("restoration_head") for stage in found if stage.kind in ("train", "cascade")]

    assert heads("demo_denoise") == ["reconstruction"]
    assert heads("demo_denoise", "model.options.restoration_head=residual") == [None]
    assert heads("denoise_unet") == [None, None]
    assert set(heads("demo")) == {None}
    cascade = ["trainings.pretrain-x2.scale=1", "trainings.pretrain-x2.init_weights=HAT.pth"]
    denoise = "phases.pretrain.degradation=[{step: noise, sigma: 25}]"
    assert heads("demo", *cascade, "trainings.pretrain-x2.start=published", denoise)[:2] == ["reconstruction"] * 2


def test_every_stage_comes_after_its_inputs() -> None:
    for name in ("hat_s", "hat", "hat_l"):
        recipe = load_recipe(name)
        seen: set[str] = set()
        for stage in plan.stages_of(recipe, outside(recipe)):
            assert set(stage.inputs) <= seen
            seen.add(stage.name)


def test_published_weights_enter_through_a_cascade() -> None:
    recipe = load_recipe(
        "demo", ["trainings.pretrain-x2.init_weights=HAT.pth", "trainings.pretrain-x2.start=published"]
    )
    found = plan.stages_of(recipe, Outside(dict.fromkeys(recipe.data, "v"), {"held-out": "v"}, {"pretrain-x2": "abc"}))
    cascade = next(stage for stage in found if stage.name == "cascade-published-to-pretrain-x2")
    assert cascade.config["weights"] == "abc"
    assert cascade.inputs == ()


def test_a_mix_comes_between_its_sets_and_what_trains_on_it() -> None:
    parts = "[{data: [sharp], share: 0.7}, {data: [photographs], share: 0.3}]"
    found = {stage.name: stage for stage in stages(f"mixes.both={parts}", "phases.finetune.data=both")}
    assert found["mix-both"].inputs == ("shard-sharp", "shard-photographs")
    assert found["finetune-x2"].inputs == ("mix-both", "pretrain-x2-again")
    changed = {
        stage.name: stage for stage in stages(f"mixes.both={parts.replace('0.7', '0.5')}", "phases.finetune.data=both")
    }
    assert changed["mix-both"].fingerprint({}) != found["mix-both"].fingerprint({})


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("compute.num_workers=1", []),
        ("compute.compile=true", []),
        ("storage.uri=s3://b/p", []),
        ("phases.finetune.checkpoint_every=3", []),
        ("phases.finetune.on_damage=skip", []),
        ("compute.cache_dir=/elsewhere", []),
        ("compute.cache_bytes=1", []),
        ("phases.finetune.num_streams=8", ["finetune-x2", "finetune-x3", "finetune-x4"]),
        ("phases.finetune.crops_per_image=2", ["finetune-x2", "finetune-x3", "finetune-x4"]),
        ("data.sharp.sub_image_px=480", ["shard-sharp"]),
        ("data.sharp.drop_duplicates=false", ["shard-sharp"]),
        ("phases.finetune.lr=0.5", ["finetune-x2", "finetune-x3", "finetune-x4"]),
        ("data.sharp.samples_per_shard=3", ["shard-sharp"]),
        ("registry.gate.better.held-out=1", ["promote"]),
        (
            "cascade.tail=bicubic",
            [f"cascade-pretrain-x{a}-to-pretrain-x{b}" for a, b in [(2, 3), (3, "2-again"), (3, 4)]],
        ),
    ],
)
def test_a_change_touches_the_stages_it_concerns(override: str, changed: list[str]) -> None:
    before = {stage.name: stage.fingerprint({}) for stage in stages()}
    after = {stage.name: stage.fingerprint({}) for stage in stages(override)}
    assert [name for name in before if before[name] != after[name]] == changed


def test_a_fingerprint_depends_on_the_inputs_content() -> None:
    stage = stages()[2]
    assert stage.fingerprint({"shard-photographs": "a"}) != stage.fingerprint({"shard-photographs": "b"})


def test_select_takes_names_groups_and_ranges() -> None:
    found = stages()
    assert plan.select(found, ["shard", "evaluate"], None, None) == {"shard-photographs", "shard-sharp", "evaluate"}
    assert plan.select(found, None, "evaluate", None) == {"evaluate", "register", "promote"}
    assert plan.select(found, None, None, "shard") == {"shard-photographs", "shard-sharp"}
    assert plan.select(found, None, "pretrain-x4", "finetune-x2") == {"pretrain-x4", "finetune-x2"}
    assert plan.select(found, None, None, None) == set(names(found))


def test_select_refuses_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="stage 'nope' is unknown; groups: shard, pretrain"):
        plan.select(stages(), ["nope"], None, None)
    with pytest.raises(ValueError, match="no stage is left"):
        plan.select(stages(), ["shard"], "evaluate", None)


def test_a_plan_knows_what_is_done_and_what_waits(tmp_path: object) -> None:
    from pipeline import artifact

    found = stages()
    first = found[0]
    made = artifact.publish(
        str(tmp_path), first.name, first.fingerprint({}), inputs={}, config=first.config, digest="content"
    )

    def current(stage: Stage, held: Artifact) -> bool:
        return True

    planned = plan.make_plan(str(tmp_path), found, {"shard-sharp", "pretrain-x2"}, current)
    actions = {entry.stage.name: entry.action for entry in planned}
    assert actions["shard-photographs"] == "done"
    assert planned[0].artifact == made
    assert actions["shard-sharp"] == actions["pretrain-x2"] == "run"
    assert actions["evaluate"] == "skip"
    lost = plan.make_plan(str(tmp_path), found, set(), lambda stage, held: False)
    assert lost[0].action == "skip"


# sha256 over names, kinds, inputs and configs of all stages: what makes finished artifacts count. It may change only
# with what is trained; a key that leaves it as it was must not enter. Restoration is left out: its networks' heads
# changed.
PINNED = {
    "demo": "b9bd20f6a5daa047",
    "hat_s": "6ff8a8c6e7b78297",
    "hat": "6c087bfc3a2b3a62",
    "hat_l": "61415181f5d0d22c",
    "hat_l_published": "0b7d51207962f26e",
    "hmanet": "81bce96089b45288",
    "real": "58aef0987ca93669",
    "real_gan": "cc04263cf4f8acb8",
}


@pytest.mark.parametrize("name", PINNED)
def test_finished_artifacts_of_shipped_recipes_still_count(name: str) -> None:
    recipe = load_recipe(name)
    backbones = {phase: "v1" for phase, config in recipe.phases.items() if config.perceptual}
    seen = Outside(dict.fromkeys(recipe.data, "v1"), dict.fromkeys(recipe.evaluate.sets, "v1"), {}, backbones)
    stages = [[stage.name, stage.kind, stage.inputs, stage.config] for stage in plan.stages_of(recipe, seen)]
    assert digest_of(stages)[:16] == PINNED[name]
