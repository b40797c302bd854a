"""Rendered manifests against Kubernetes' own schemas, and KubeRay's documented fields."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipeline import cronjobs
from pipeline.cli import main
from pipeline.domain import DomainConfig, load_domain
from tests.shared_data import ROOT

EXAMPLE = "configs/domain/text.yaml"
KUBERNETES = "1.34"
# https://ray-project.github.io/kuberay/reference/api/
RAY_JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "entrypoint", "rayClusterSpec", "shutdownAfterJobFinishes"),
    *("submissionMode", "ttlSecondsAfterFinished", "runtimeEnvYAML", "suspend", "jobId", "metadata"),
}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts"}


def example(*overrides: str) -> DomainConfig:
    return load_domain(str(ROOT / EXAMPLE), list(overrides))


def manifests(kind: cronjobs.Kind, *overrides: str) -> dict[str, Any]:
    found = yaml.safe_load_all(cronjobs.render(example(*overrides), kind, EXAMPLE))
    return {manifest["kind"]: manifest for manifest in found}


def check_ray_job(spec: dict[str, Any]) -> None:
    assert set(spec) <= RAY_JOB_FIELDS
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    assert set(cluster["headGroupSpec"]) == {"rayStartParams", "template"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert set(group) <= WORKER_FIELDS
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        (container,) = group["template"]["spec"]["containers"]
        assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in container["env"]


@pytest.mark.parametrize("overrides", [(), ("schedule.gpus=0", "schedule.workers=0", "schedule.env_secret=null")])
def test_the_cronjob_is_valid_forbids_two_at_once_and_keeps_little(overrides: tuple[str, ...]) -> None:
    found = manifests("cronjob", *overrides)
    assert list(found) == ["ServiceAccount", "Role", "RoleBinding", "ConfigMap", "CronJob"]
    for manifest in found.values():
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    spec = found["CronJob"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (3, 3)
    ray_job = yaml.safe_load(found["ConfigMap"]["data"]["rayjob.yaml"])
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    check_ray_job(ray_job["spec"])
    # the job's pod waits for the RayJob: while one runs, Kubernetes starts no other
    (waiting,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert waiting["args"][:2] == ["wait", "rayjob/retrain-text"]
    assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > ray_job["spec"]["activeDeadlineSeconds"]


def test_the_schemas_would_find_a_fault() -> None:
    wrong = manifests("cronjob")["CronJob"]
    wrong["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_raycronjob_says_that_it_is_alpha() -> None:
    found = manifests("raycronjob")
    kubernetes_validate.validate(found["ConfigMap"], KUBERNETES, strict=True)
    spec = found["RayCronJob"]["spec"]
    assert set(spec) == {"schedule", "suspend", "jobTemplate"}
    check_ray_job(spec["jobTemplate"])
    assert "alpha" in cronjobs.render(example(), "raycronjob", EXAMPLE).splitlines()[1]


def test_the_pods_read_the_domain_that_was_rendered(tmp_path: Path) -> None:
    text = manifests("cronjob", "training.steps=77")["ConfigMap"]["data"]["domain.yaml"]
    (tmp_path / "domain.yaml").write_text(text)
    assert load_domain(str(tmp_path / "domain.yaml")) == example("training.steps=77")


def test_the_cron_line_submits_to_ray() -> None:
    line = cronjobs.render(example("schedule.cron=5 4 * * 0", "name=text"), "cron", "a%b.yaml")
    assert line.startswith("5 4 * * 0 cd /hatchery && ray job submit --address http://127.0.0.1:8265 --working-dir . ")
    assert """--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}' -- """ in line
    assert line.endswith("python pipeline/retrain.py a\\%b.yaml\n")


@pytest.mark.parametrize(
    ("override", "words"),
    [("storage.uri=runs", "storage.uri 'runs'"), ("source=/in", "source '/in'"), ("tracking.uri=null", "tracking.uri")],
)
def test_what_pods_cannot_reach_is_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cronjobs.render(example(override), "cronjob", EXAMPLE)


@pytest.mark.parametrize("kind", ["cronjob", "raycronjob", "cron"])
def test_the_examples_in_infra_are_what_the_command_prints(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["schedule", "render", EXAMPLE, "--kind", kind])
    assert ended.value.code == 0
    name = "crontab" if kind == "cron" else f"{kind}.yaml"
    assert capsys.readouterr().out == (ROOT / "infra" / "retrain" / name).read_text()


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["schedule", "render", "/absent.yaml"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
