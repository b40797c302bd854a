"""Manifests that retrain a domain on a schedule, made from the domain's YAML; nothing here talks to a cluster.

cronjob: a Kubernetes CronJob that makes a KubeRay RayJob and waits for its end, so that `Forbid` means something.
raycronjob: KubeRay's own RayCronJob, alpha since KubeRay 1.6 and off unless its feature gate is on; it has no
concurrency policy, two at once are sorted out by the domain's lock in the storage.
cron: a line for crontab that submits to a running Ray cluster.
Fields: https://ray-project.github.io/kuberay/reference/api/ (RayJobSpec, RayClusterSpec, RayCronJobSpec).
"""

import json
import shlex
from typing import Any, Literal

import yaml

from pipeline.domain import DomainConfig

Kind = Literal["cronjob", "raycronjob", "cron"]
Manifest = dict[str, Any]

KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.1"
RAY_VERSION = "2.60.0"
# `ray job stop` waits so long between SIGTERM and SIGKILL, by default 3 s: a checkpoint takes longer.
STOP_WAIT = {"RAY_JOB_STOP_WAIT_TIME_S": "300"}
_CONFIG_DIR, _MANIFEST_DIR = "/etc/hatchery", "/rayjob"
_ALPHA = (
    "# RayCronJob is alpha: KubeRay >= 1.6, operator started with --feature-gates=RayCronJob=true (off by default).\n"
)


def render(domain: DomainConfig, kind: Kind, domain_file: str) -> str:
    """What to `kubectl apply`, or the crontab line. ValueError for storage or tracking that pods cannot reach."""
    if kind == "cron":
        return cron_line(domain, domain_file)
    _check_reachable(domain)
    manifests = cronjob(domain) if kind == "cronjob" else raycronjob(domain)
    header = f"# Made by: hatchery schedule render {domain_file} --kind {kind}\n"
    return header + (_ALPHA if kind == "raycronjob" else "") + yaml.safe_dump_all(manifests, sort_keys=False)


def _check_reachable(domain: DomainConfig) -> None:
    for key, uri in {"storage.uri": domain.storage.uri, "source": domain.source}.items():
        if not uri.startswith("s3://"):
            raise ValueError(f"{key} {uri!r} is not in an object store: pods of a cluster cannot see it, use s3://")
    if not (domain.tracking.uri or "").startswith(("http://", "https://")):
        raise ValueError(f"tracking.uri {domain.tracking.uri!r} is no server's address: give http://host:port")


def cronjob(domain: DomainConfig) -> list[Manifest]:
    """Service account, role, binding, config map and the CronJob; the RayJob travels in the config map."""
    name, schedule = _name(domain), domain.schedule
    role_ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    verbs = ["get", "list", "watch", "create", "delete"]
    rayjob = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(domain),
        "spec": rayjob_spec(domain),
    }
    data = _config_data(domain) | {"rayjob.yaml": yaml.safe_dump(rayjob, sort_keys=False)}
    job = {
        "backoffLimit": 0,
        "activeDeadlineSeconds": schedule.deadline_s + 600,
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
    """Delete the last RayJob, make the next one, wait until it has ended; the image has no shell."""
    name = _name(domain)
    mount = {"name": "manifest", "mountPath": _MANIFEST_DIR, "readOnly": True}
    wait = ["wait", f"rayjob/{name}", "--for=jsonpath={.status.endTime}", f"--timeout={domain.schedule.deadline_s}s"]

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
            kubectl("delete-last", "delete", "rayjob", name, "--ignore-not-found", "--wait"),
            kubectl("create", "create", "-f", f"{_MANIFEST_DIR}/rayjob.yaml"),
        ],
        "containers": [kubectl("wait", *wait)],
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
        "backoffLimit": 1,
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


def cron_line(domain: DomainConfig, domain_file: str) -> str:
    """A crontab line, to be run in the project's folder on a machine that reaches the Ray cluster."""
    address = shlex.quote(domain.schedule.ray_address)
    job = f"python pipeline/retrain.py {shlex.quote(domain_file)}"
    runtime = shlex.quote(json.dumps({"env_vars": STOP_WAIT}))
    submit = f"ray job submit --address {address} --working-dir . --runtime-env-json {runtime} -- {job}"
    command = f"cd {shlex.quote(domain.schedule.working_dir)} && {submit}"
    return f"{domain.schedule.cron} {command.replace('%', chr(92) + '%')}\n"


def _config_data(domain: DomainConfig) -> dict[str, str]:
    return {"domain.yaml": yaml.safe_dump(domain.model_dump(mode="json"), sort_keys=False)}


def _name(domain: DomainConfig) -> str:
    return f"retrain-{domain.name}"


def _labels(domain: DomainConfig) -> dict[str, str]:
    return {"app.kubernetes.io/name": "hatchery", "hatchery/domain": domain.name}


def _metadata(domain: DomainConfig) -> Manifest:
    return {"name": _name(domain), "namespace": domain.schedule.namespace, "labels": _labels(domain)}
