"""Manifests that retrain a domain on a schedule, made from the domain's YAML; nothing here talks to a cluster.

cronjob: a Kubernetes CronJob that makes a KubeRay RayJob and waits for its end, so that `Forbid` means something, and
fails where the RayJob did.
raycronjob: KubeRay's own RayCronJob, alpha since KubeRay 1.6 and off unless its feature gate is on; it has no
concurrency policy, two at once are sorted out by the domain's lock in the storage.
cron: a line for crontab that submits to a running Ray cluster.
Fields: https://ray-project.github.io/kuberay/reference/api/ (RayJobSpec, RayClusterSpec, RayCronJobSpec).
"""

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from data_prep import storage
from data_prep.redact import without_secrets
from data_prep.sources import PHOTOGRAPHS
from pipeline.domain import DomainConfig

Kind = Literal["cronjob", "raycronjob", "cron"]
Manifest = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.1"
RAY_VERSION = "2.60.0"
# `ray job stop` waits so long between SIGTERM and SIGKILL, by default 3 s: a checkpoint takes longer.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
_CONFIG_DIR, _MANIFEST_DIR = "/etc/hatchery", "/rayjob"
_PREFIX = "retrain-"
_LONGEST_NAME = 47  # of a RayJob: the names of its cluster's services must fit 63 characters
_APPENDED = 11  # by RayCronJob to its own name, for each RayJob: 6 random characters in 1.6, the time in later ones
_ENDED = "hatchery/ended"  # label of a RayJob that may be deleted
_ATTEMPTS = 2  # of a RayJob; KubeRay counts activeDeadlineSeconds from the beginning of each
_SLACK_S = 600  # for clusters to come and go
_ALPHA = """\
# RayCronJob is alpha: KubeRay >= 1.6, operator started with --feature-gates=RayCronJob=true (off by default).
# It bounds no history: finished RayJobs pile up (without their clusters) until somebody deletes them, unless the
# operator runs with the environment variable DELETE_RAYJOB_CR_AFTER_JOB_FINISHES=true. --kind cronjob keeps one.
"""


_SIGN_IN = """\
# Logins in URIs are left out: hand them on by the environment (schedule.env_secret, or schedule.runtime_env for cron),
# MLflow's as MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD.
"""


def render(domain: DomainConfig, kind: Kind, domain_file: str, overrides: Sequence[str] = ()) -> str:
    """What to `kubectl apply`, or the crontab line. ValueError for what a cluster would not take.

    overrides: those that `domain` was loaded with; a crontab line must repeat them. Logins in URIs are left out of
    everything, which is said at the top.
    """
    shown = [without_secrets(override) for override in overrides]
    note = _SIGN_IN if shown != list(overrides) or _holds_secrets(domain) else ""
    return note + without_secrets(_render(domain, kind, domain_file, shown))


def _holds_secrets(domain: DomainConfig) -> bool:
    uris = (*_places(domain).values(), domain.tracking.uri or "", domain.schedule.ray_address)
    return any(without_secrets(uri) != uri for uri in uris)


def _render(domain: DomainConfig, kind: Kind, domain_file: str, overrides: Sequence[str]) -> str:
    sets = [part for override in overrides for part in ("--set", override)]
    command = shlex.join(["hatchery", "schedule", "render", domain_file, *sets, "--kind", kind])
    header = f"# Made by: {' '.join(command.splitlines())}\n"
    if kind == "cron":
        return header + cron_line(domain, domain_file, sets)
    _check_reachable(domain)
    _check_name(domain, kind)
    if domain.schedule.image is None:
        raise ValueError("schedule.image is not set: build infra/Dockerfile, push it, and name it there")
    manifests = cronjob(domain) if kind == "cronjob" else raycronjob(domain)
    return header + (_ALPHA if kind == "raycronjob" else "") + yaml.safe_dump_all(manifests, sort_keys=False)


def _check_reachable(domain: DomainConfig) -> None:
    for key, uri in _places(domain).items():
        if not uri.startswith("s3://") and uri != PHOTOGRAPHS:
            raise ValueError(f"{key} {uri!r} is not in an object store: pods of a cluster cannot see it, use s3://")
    if not (domain.tracking.uri or "").startswith(("http://", "https://")):
        raise ValueError(f"tracking.uri {domain.tracking.uri!r} is no server's address: give http://host:port")


def _places(domain: DomainConfig) -> dict[str, str]:
    """Every place that a retraining reads or writes, by its key."""
    places = {"storage.uri": domain.storage.uri, "source": domain.source, "replay.source": domain.replay.source}
    places |= {f"evaluate.sets.{name}": uri for name, uri in domain.evaluate.sets.items()}
    for name, config in domain.evaluate.protocol.distances.items():
        places |= {f"evaluate.protocol.{name}.{key}": uri for key, uri in config.model_dump().items()}
    return places


def _check_name(domain: DomainConfig, kind: Kind) -> None:
    longest = _LONGEST_NAME - len(_PREFIX) - (_APPENDED if kind == "raycronjob" else 0)
    if len(domain.name) > longest:
        raise ValueError(
            f"name {domain.name!r} has {len(domain.name)} characters: KubeRay takes {longest} for a {kind}, shorten it"
        )


def cronjob(domain: DomainConfig) -> list[Manifest]:
    """Service account, role, binding, config map and the CronJob; the RayJob travels in the config map."""
    name, schedule = _name(domain), domain.schedule
    role_ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    verbs = ["get", "list", "watch", "create", "patch", "delete"]
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(domain),
        "spec": rayjob_spec(domain),
    }
    data = _config_data(domain) | {"rayjob.yaml": yaml.safe_dump(rayjob, sort_keys=False)}
    evicted = {"type": "DisruptionTarget", "status": "True"}
    job = {
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [evicted]}]},  # the next pod waits on
        "activeDeadlineSeconds": _longest_s(domain) + _SLACK_S,
        "template": {"metadata": {"labels": _labels(domain)}, "spec": _kubectl_pod(domain)},
    }
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(domain)},
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "Role",
            "metadata": _metadata(domain),
            "rules": [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": verbs}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": _metadata(domain),
            "roleRef": role_ref,
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": schedule.namespace}],
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(domain), "data": data},
        {
            "apiVersion": "batch/v1",
            "kind": "CronJob",
            "metadata": _metadata(domain),
            "spec": {
                "schedule": schedule.cron,
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "successfulJobsHistoryLimit": schedule.history,
                "failedJobsHistoryLimit": schedule.history,
                "jobTemplate": {"spec": job},
            },
        },
    ]


def _kubectl_pod(domain: DomainConfig) -> Manifest:
    """Delete the last RayJob if it has ended, make the next one, wait for its end and note it, see that it succeeded.

    A RayJob that is still running is never deleted: `apply` leaves it as it is, saying so, and the pod waits for it
    instead. So it goes where the last pod that waited was evicted, or a Job was made by hand meanwhile. Each step is a
    container, since the image has no shell; the pod fails with the first that fails.
    """
    name = _name(domain)
    rayjob = f"rayjob/{name}"
    mount = {"name": "manifest", "mountPath": _MANIFEST_DIR, "readOnly": True}

    def kubectl(step: str, *arguments: str) -> Manifest:
        return {
            "name": step,
            "image": KUBECTL_IMAGE,
            "args": list(arguments),
            "volumeMounts": [mount],
            "resources": {"requests": {"cpu": "50m", "memory": "64Mi"}, "limits": {"memory": "256Mi"}},
        }

    return {
        "serviceAccountName": name,
        "restartPolicy": "Never",
        "initContainers": [
            kubectl("delete-last", "delete", "rayjob", f"--selector=hatchery/domain={domain.name},{_ENDED}=true"),
            kubectl("create", "apply", "-f", f"{_MANIFEST_DIR}/rayjob.yaml"),
            kubectl("wait", "wait", rayjob, "--for=jsonpath={.status.endTime}", f"--timeout={_longest_s(domain)}s"),
            kubectl("note-end", "label", rayjob, f"{_ENDED}=true", "--overwrite"),
        ],
        "containers": [
            kubectl("succeeded", "wait", rayjob, "--for=jsonpath={.status.jobStatus}=SUCCEEDED", "--timeout=0s")
        ],
        "volumes": [{"name": "manifest", "configMap": {"name": name}}],
    }


def raycronjob(domain: DomainConfig) -> list[Manifest]:
    """The config map with the domain, and the RayCronJob."""
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(domain), "data": _config_data(domain)}
    spec = {"schedule": domain.schedule.cron, "suspend": False, "jobTemplate": rayjob_spec(domain)}
    return [
        config_map,
        {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": _metadata(domain), "spec": spec},
    ]


def rayjob_spec(domain: DomainConfig) -> Manifest:
    """A RayJob's spec: a cluster for the time of one retraining."""
    schedule = domain.schedule
    script = f"{schedule.working_dir}/pipeline/retrain.py"
    worker = {
        "groupName": "workers",
        "replicas": schedule.workers,
        "minReplicas": schedule.workers,
        "maxReplicas": max(1, schedule.workers),
        "rayStartParams": {},
        "template": pod_template(domain, "ray-worker", schedule.gpus),
    }
    return {
        "entrypoint": shlex.join(["python", script, f"{_CONFIG_DIR}/domain.yaml"]),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "activeDeadlineSeconds": schedule.deadline_s,
        "backoffLimit": _ATTEMPTS - 1,
        "rayClusterSpec": {
            "rayVersion": RAY_VERSION,
            "headGroupSpec": {"rayStartParams": {}, "template": pod_template(domain, "ray-head", 0)},
            "workerGroupSpecs": [worker] if schedule.workers else [],
        },
    }


def pod_template(domain: DomainConfig, container: str, gpus: int) -> Manifest:
    """Head or worker: the image, its resources, the domain's file, secrets as environment variables."""
    schedule = domain.schedule
    resources: dict[str, Any] = {"cpu": str(schedule.cpus), "memory": f"{schedule.memory_gib}Gi"}
    limits = resources | ({"nvidia.com/gpu": gpus} if gpus else {})
    made: Manifest = {
        "name": container,
        "image": schedule.image,
        "env": [
            {"name": key, "value": value} for key, value in ({"PYTHONPATH": schedule.working_dir} | STOP_WAIT).items()
        ],
        "resources": {"requests": dict(limits), "limits": limits},
        "volumeMounts": [{"name": "domain", "mountPath": _CONFIG_DIR, "readOnly": True}],
    }
    if schedule.env_secret:
        made["envFrom"] = [{"secretRef": {"name": schedule.env_secret}}]
    items = [{"key": "domain.yaml", "path": "domain.yaml"}]
    volume = {"name": "domain", "configMap": {"name": _name(domain), "items": items}}
    return {"metadata": {"labels": _labels(domain)}, "spec": {"containers": [made], "volumes": [volume]}}


def cron_line(domain: DomainConfig, domain_file: str, sets: Sequence[str] = ()) -> str:
    """A crontab line for a machine that has the project in `working_dir` and reaches the Ray cluster.

    Cron knows no virtual environment and no variables: `ray` is named by its path, and what S3 and MLflow need is in a
    file, so that the crontab holds no secrets. ValueError for what the job would not find.
    """
    schedule = domain.schedule
    if storage.is_local(domain.storage.uri) and not domain.storage.uri.startswith("/"):
        raise ValueError(
            f"storage.uri {domain.storage.uri!r} is lost with the job's folder: give a path from / or s3://"
        )
    ray = schedule.ray or f"{schedule.working_dir}/.venv/bin/ray"
    submit = [ray, "job", "submit", "--address", schedule.ray_address, "--working-dir", "."]
    if schedule.runtime_env:
        submit += ["--runtime-env", schedule.runtime_env]
    else:
        submit += ["--runtime-env-json", json.dumps({"env_vars": STOP_WAIT})]
    job = ["python", "pipeline/retrain.py", _in_project(domain, domain_file), *sets]
    command = f"cd {shlex.quote(schedule.working_dir)} && {shlex.join([*submit, '--', *map(_for_ray, job)])}"
    return f"{schedule.cron} {command.replace('%', chr(92) + '%')}\n"


def _in_project(domain: DomainConfig, file: str) -> str:
    """The path of the domain's file below the project, which is all that Ray uploads; ValueError for others."""
    path = Path(file).resolve()
    for folder in (Path(domain.schedule.working_dir), ROOT):
        if path.is_relative_to(folder):
            return str(path.relative_to(folder))
    raise ValueError(f"{path} is outside of the project, which is all that a job gets: copy it below {ROOT}")


def _for_ray(argument: str) -> str:
    """An argument of the job as `ray job submit` must be given it: it joins them as Windows does, for a shell.

    With spaces in it, it comes to that shell in double quotes, else bare.
    """
    if any(character in argument for character in '"\\\n'):
        raise ValueError(f"{argument!r} cannot go through ray job submit: write it into the domain's file")
    special = r"[$`]" if any(map(str.isspace, argument)) else r"[^\w@%+=:,./-]"
    return re.sub(special, r"\\\g<0>", argument)


def _longest_s(domain: DomainConfig) -> int:
    """How long a RayJob may take with all its attempts."""
    return _ATTEMPTS * domain.schedule.deadline_s + _SLACK_S


def _config_data(domain: DomainConfig) -> dict[str, str]:
    return {"domain.yaml": yaml.safe_dump(domain.model_dump(mode="json"), sort_keys=False)}


def _name(domain: DomainConfig) -> str:
    return f"{_PREFIX}{domain.name}"


def _labels(domain: DomainConfig) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hatchery", "hatchery/domain": domain.name}


def _metadata(domain: DomainConfig) -> Manifest:
    return {"name": _name(domain), "namespace": domain.schedule.namespace, "labels": _labels(domain)}
