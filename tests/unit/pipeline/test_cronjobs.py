"""Rendered manifests against Kubernetes' own schemas, and KubeRay's documented fields."""

import subprocess
import tomllib
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


def steps(found: dict[str, Any]) -> dict[str, list[str]]:
    """What the CronJob's pod does, in order: name -> kubectl's arguments."""
    pod = found["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return {step["name"]: step["args"] for step in [*pod["initContainers"], *pod["containers"]]}


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
    assert steps(found)["wait"][:3] == ["wait", "rayjob/retrain-text", "--for=jsonpath={.status.endTime}"]


def test_a_rayjob_that_failed_fails_the_job() -> None:
    """`endTime` is there after a failure too: the pod's exit code, and so the Job's fate, is that of the last step."""
    last, arguments = list(steps(manifests("cronjob")).items())[-1]
    assert last == "succeeded"
    assert arguments[:3] == ["wait", "rayjob/retrain-text", "--for=jsonpath={.status.jobStatus}=SUCCEEDED"]


def test_deadlines_cover_every_attempt() -> None:
    """KubeRay resets a RayJob's start time when it retries, so its deadline is one attempt's."""
    found = manifests("cronjob", "schedule.deadline_s=1000")
    ray_job = yaml.safe_load(found["ConfigMap"]["data"]["rayjob.yaml"])["spec"]
    longest = ray_job["activeDeadlineSeconds"] * (1 + ray_job["backoffLimit"])
    waiting = int(steps(found)["wait"][-1].removeprefix("--timeout=").removesuffix("s"))
    assert longest < waiting < found["CronJob"]["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]


def test_a_rayjob_that_may_be_running_is_never_deleted() -> None:
    """Only what was labelled after its end is; any other RayJob of the name is left, and waited for."""
    found = manifests("cronjob")
    order = steps(found)
    assert list(order) == ["delete-last", "create", "wait", "note-end", "succeeded"]
    assert order["delete-last"] == ["delete", "rayjob", "--selector=hatchery/domain=text,hatchery/ended=true"]
    assert order["create"][0] == "apply"
    assert order["note-end"][:3] == ["label", "rayjob/retrain-text", "hatchery/ended=true"]
    ray_job = yaml.safe_load(found["ConfigMap"]["data"]["rayjob.yaml"])
    assert ray_job["metadata"]["labels"]["hatchery/domain"] == "text"
    assert "hatchery/ended" not in ray_job["metadata"]["labels"]
    (rule,) = found["CronJob"]["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")


def test_the_schemas_would_find_a_fault() -> None:
    wrong = manifests("cronjob")["CronJob"]
    wrong["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_raycronjob_says_that_it_is_alpha_and_cleans_nothing_up() -> None:
    found = manifests("raycronjob")
    kubernetes_validate.validate(found["ConfigMap"], KUBERNETES, strict=True)
    spec = found["RayCronJob"]["spec"]
    assert set(spec) == {"schedule", "suspend", "jobTemplate"}
    check_ray_job(spec["jobTemplate"])
    header = cronjobs.render(example(), "raycronjob", EXAMPLE).split("apiVersion")[0]
    assert "alpha" in header.splitlines()[1]
    assert "finished RayJobs pile up" in header


def test_the_image_must_be_named_and_can_be_built() -> None:
    """No public image holds this project: there is no default, but a Dockerfile that copies what the pods need."""
    with pytest.raises(ValueError, match=r"schedule\.image is not set: build infra/Dockerfile"):
        cronjobs.render(example("schedule.image=null"), "cronjob", EXAMPLE)
    lines = (ROOT / "infra" / "Dockerfile").read_text().splitlines()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in {package.partition(".")[0] for package in project["tool"]["setuptools"]["packages"]}:
        assert f"COPY {package} {package}" in lines
    assert f"WORKDIR {example().schedule.working_dir}" in lines
    assert f"ray=={cronjobs.RAY_VERSION} \\" in (ROOT / "requirements.txt").read_text().splitlines()


def test_the_pods_read_the_domain_that_was_rendered(tmp_path: Path) -> None:
    text = manifests("cronjob", "training.steps=77")["ConfigMap"]["data"]["domain.yaml"]
    (tmp_path / "domain.yaml").write_text(text)
    assert load_domain(str(tmp_path / "domain.yaml")) == example("training.steps=77")


SUBMIT = "job submit --address http://127.0.0.1:8265 --working-dir . "


def test_the_cron_line_submits_to_ray() -> None:
    made, line = cronjobs.render(example("schedule.cron=5 4 * * 0"), "cron", "a%b.yaml").splitlines()
    assert made == "# Made by: hatchery schedule render a%b.yaml --kind cron"
    env = "--runtime-env /etc/hatchery/runtime-env.yaml"
    assert line.startswith(f"5 4 * * 0 cd /hatchery && /hatchery/.venv/bin/ray {SUBMIT}{env} -- python ")
    assert line.endswith("python pipeline/retrain.py a\\%b.yaml")


def test_the_cron_line_knows_no_virtual_environment_and_no_variables() -> None:
    """Cron's PATH has no `ray`, and what S3 needs is read from a file by Ray, never written in the crontab."""
    domain = example("schedule.ray=/opt/ray env/bin/ray", "schedule.runtime_env=null", "schedule.working_dir=/my job")
    line = cronjobs.cron_line(domain, EXAMPLE)
    wait = """--runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "300"}}' """
    assert f"cd '/my job' && '/opt/ray env/bin/ray' {SUBMIT}{wait}-- python pipeline/retrain.py {EXAMPLE}" in line


def run_as_cron_and_ray_do(line: str, folder: Path) -> list[str]:
    """What the job's program is given: a shell reads cron's command, Ray joins what is behind -- for another one."""
    command = line.split(" && ")[1].strip().replace("\\%", "%")
    show = folder / "show"
    show.write_text('#!/bin/sh\nfor part in "$@"; do echo "$part"; done\n')
    show.chmod(0o755)
    told = subprocess.run(
        command.replace("/hatchery/.venv/bin/ray", str(show)), shell=True, capture_output=True, text=True
    )
    words = told.stdout.splitlines()
    entrypoint = subprocess.list2cmdline([str(show), *words[words.index("--") + 1 :]])
    return subprocess.run(entrypoint, shell=True, capture_output=True, text=True).stdout.splitlines()


def test_the_cron_lines_overrides_arrive_as_they_were_given(tmp_path: Path) -> None:
    sets = ["training.steps=77", "evaluate.sets={Set5: s3://a/b c, New: s3://d}"]
    sets += ["include=[a*b,it's;50%,$HOME]", "exclude=[`b` $c]"]
    text = cronjobs.render(example(sets[0]), "cron", EXAMPLE, sets)
    arrived = run_as_cron_and_ray_do(text.splitlines()[1], tmp_path)
    assert arrived == ["python", "pipeline/retrain.py", EXAMPLE, *[x for part in sets for x in ("--set", part)]]
    for hopeless in ('a="b"', "a=\\", "a=\nb"):
        with pytest.raises(ValueError, match="cannot go through ray job submit: write it into the domain's file"):
            cronjobs.render(example(), "cron", EXAMPLE, [hopeless])


def test_the_cron_lines_job_finds_its_file_and_its_storage(tmp_path: Path) -> None:
    """Ray uploads the project and runs the job in a folder of its own."""
    (tmp_path / "configs").mkdir()
    elsewhere = example(f"schedule.working_dir={tmp_path}")
    assert cronjobs.cron_line(elsewhere, f"{tmp_path}/configs/x.yaml").endswith("retrain.py configs/x.yaml\n")
    with pytest.raises(ValueError, match=r"x\.yaml is outside of the project"):
        cronjobs.cron_line(example(), f"{tmp_path}/configs/x.yaml")
    with pytest.raises(ValueError, match=r"storage\.uri 'runs' is lost with the job's folder"):
        cronjobs.cron_line(example("storage.uri=runs"), EXAMPLE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("storage.uri=runs", "storage.uri 'runs'"),
        ("source=/in", "source '/in'"),
        ("replay.source=/old", "replay.source '/old'"),
        ("evaluate.sets.Set5=/data/Set5", "evaluate.sets.Set5 '/data/Set5'"),
        ("evaluate.protocol.lpips={backbone: s3://w/a.pth, calibration: b.pth}", r"lpips\.calibration 'b\.pth'"),
        ("evaluate.protocol.dists={backbone: s3://w/v.pth, calibration: w.pt}", r"dists\.calibration 'w\.pt'"),
        ("tracking.uri=null", "tracking.uri"),
    ],
)
def test_what_pods_cannot_reach_is_refused(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cronjobs.render(example(override), "cronjob", EXAMPLE)


def test_photographs_of_a_package_are_in_the_image() -> None:
    assert "photographs:" in cronjobs.render(example("replay.source='photographs:'"), "cronjob", EXAMPLE)


@pytest.mark.parametrize(("kind", "longest"), [("cronjob", 39), ("raycronjob", 28)])
def test_names_too_long_for_kuberay_are_refused(kind: cronjobs.Kind, longest: int) -> None:
    """A RayJob's name has 47 characters at most; RayCronJob appends to its own."""
    fits, too_long = (example().model_copy(update={"name": "n" * length}) for length in (longest, longest + 1))
    cronjobs.render(fits, kind, EXAMPLE)
    with pytest.raises(ValueError, match=rf"has {longest + 1} characters: KubeRay takes {longest} for a {kind}"):
        cronjobs.render(too_long, kind, EXAMPLE)


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


@pytest.mark.parametrize("kind", ["cronjob", "raycronjob", "cron"])
def test_no_login_is_rendered_and_how_to_hand_it_on_is_said(kind: cronjobs.Kind) -> None:
    overrides = ["tracking.uri=https://me:hunter2@mlflow/x", "schedule.ray_address=http://me:hunter2@head:8265"]
    made = cronjobs.render(example(*overrides), kind, EXAMPLE, overrides)
    assert "hunter2" not in made
    assert "tracking.uri=https://mlflow/x" in made
    assert "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in made.splitlines()[1]
    if kind == "cron":
        assert "--address http://head:8265 " in made
    else:
        assert "MLFLOW_TRACKING_USERNAME" not in cronjobs.render(example(), kind, EXAMPLE)
