"""cluster/rayjob.yaml and volume.yaml, as far as they can be checked without Kubernetes."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from lgd.base.arguments import Parser
from lgd.cli import VERBS
from lgd.config import Config
from lgd.config_files import config_of

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
# The fields of ray.io/v1 that KubeRay's API reference (1.7.0) names, for each object in the file; an unknown one would
# be refused by kubectl, or dropped by an old operator without a word.
JOB = """activeDeadlineSeconds backoffLimit rayClusterSpec submitterPodTemplate metadata clusterSelector submitterConfig
managedBy deletionStrategy entrypoint runtimeEnvYAML jobId submissionMode entrypointResources entrypointNumCpus
entrypointNumGpus ttlSecondsAfterFinished preRunningDeadlineSeconds shutdownAfterJobFinishes suspend""".split()
CLUSTER_SPEC = """upgradeStrategy authOptions suspend managedBy autoscalerOptions headServiceAnnotations
enableInTreeAutoscaling gcsFaultToleranceOptions historyServerOptions networkPolicy tlsOptions headGroupSpec rayVersion
workerGroupSpecs""".split()
HEAD = "enableIngress headService rayStartParams resources labels template".split()
WORKERS = """groupName replicas minReplicas maxReplicas idleTimeoutSeconds priority rayStartParams resources
labels template scaleStrategy numOfHosts""".split()
# Of core/v1, what the pods here use.
POD = "containers volumes securityContext automountServiceAccountToken enableServiceLinks".split()
CONTAINER = "name image env resources securityContext volumeMounts".split()


def job() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((CLUSTER / "rayjob.yaml").read_text())
    return document


def pods() -> dict[str, dict[str, Any]]:
    cluster = job()["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **groups}


def run_of(command: str) -> tuple[str, Config]:
    """The verb of a command line in the image and the run that it names, through lgd's own parser."""
    python, module, lgd, verb, *args = shlex.split(command)
    assert (python, module, lgd) == ("python", "-m", "lgd")
    parser = Parser()
    VERBS[verb][1](parser)
    # In the image the checkout is /opt/lgd; tests/cluster/test_dockerfile.py holds it to that.
    here = [arg.replace("/opt/lgd/", f"{ROOT}/") for arg in args]
    return verb, config_of(parser.parse(here))


def assert_cluster_is_of_kuberay(cluster: dict[str, Any], pods: dict[str, dict[str, Any]]) -> None:
    assert set(cluster) <= set(CLUSTER_SPEC)
    assert set(cluster["headGroupSpec"]) <= set(HEAD)
    for group in cluster["workerGroupSpecs"]:
        assert set(group) <= set(WORKERS)
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pods.values():
        assert set(pod) <= set(POD)
        assert all(set(container) <= set(CONTAINER) for container in pod["containers"])
    params = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    # KubeRay wants strings here: a bare 0 is refused.
    assert all(isinstance(value, str) for group in params for value in group["rayStartParams"].values())


def test_every_field_is_one_of_kuberay():
    document = job()
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    spec = document["spec"]
    cluster = spec["rayClusterSpec"]
    assert set(spec) <= set(JOB)
    assert_cluster_is_of_kuberay(cluster, pods())


def test_a_failed_or_lost_run_is_started_again_and_goes_on():
    spec = job()["spec"]
    assert spec["backoffLimit"] >= 1 and spec["shutdownAfterJobFinishes"] is True
    verb, config = run_of(spec["entrypoint"])
    assert verb == "train" and config.train.resume == "auto"
    # What the next cluster must find is on the volume that outlives this one, in every pod.
    (claim,) = yaml.safe_load_all((CLUSTER / "volume.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods().values():
        (volume,) = (v for v in pod["volumes"] if "persistentVolumeClaim" in v)
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (mount,) = (m for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"])
        kept = [config.run.dir, config.student.dir, config.teacher.dir, config.latents.dir, *config.shard_dirs]
        assert all(Path(folder).is_relative_to(mount["mountPath"]) for folder in kept)
    # Deleting the job must not delete what it made.
    assert "PersistentVolumeClaim" not in (CLUSTER / "rayjob.yaml").read_text()


def test_the_run_asks_for_the_gpus_that_the_cluster_has():
    cluster = job()["spec"]["rayClusterSpec"]
    workers = 0
    for group in cluster["workerGroupSpecs"]:
        resources = group["template"]["spec"]["containers"][0]["resources"]
        assert resources["limits"] == resources["requests"]
        workers += group["replicas"] * int(resources["limits"]["nvidia.com/gpu"])
    _, config = run_of(job()["spec"]["entrypoint"])
    assert config.train.workers == workers
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no training worker lands on the head"


def test_token_authentication_is_on_and_no_secret_is_written_down():
    cluster = job()["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    version = tuple(map(int, cluster["rayVersion"].split(".")))
    assert version >= (2, 52, 0), "KubeRay refuses authOptions below"
    text = (CLUSTER / "rayjob.yaml").read_text()
    assert "RAY_AUTH" not in text and "auth_token" not in text
    # Services of these kinds would show the dashboard outside the cluster.
    assert not {"headService", "enableIngress"} & set(cluster["headGroupSpec"])
    assert "LoadBalancer" not in text and "NodePort" not in text


def test_pods_are_the_image_without_privileges():
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    uid = int(re.search(r"^USER (\d+)$", dockerfile, re.MULTILINE)[1])
    images = set()
    for pod in pods().values():
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["runAsUser"] == uid and context["fsGroup"] == uid
        (container,) = pod["containers"]
        images.add(container["image"])
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
        # What Ray, torch and the caches write where nothing else is writable.
        assert {"/tmp", "/home/lgd", "/dev/shm"} < {mount["mountPath"] for mount in container["volumeMounts"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        (shared,) = (m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm")
        (memory,) = (v["emptyDir"] for v in pod["volumes"] if v["name"] == shared)
        assert memory["medium"] == "Memory"
    (image,) = images
    assert f"--tag {image} " in dockerfile


def test_a_stopped_job_has_time_to_save():
    (container,) = pods()["head"]["containers"]
    (seconds,) = (int(e["value"]) for e in container["env"] if e["name"] == "RAY_JOB_STOP_WAIT_TIME_S")
    assert seconds >= 60
