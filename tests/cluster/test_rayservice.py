"""cluster/rayservice.yaml, as far as Kubernetes is not needed; tests/test_job.py deploys its application."""

import importlib
import re
from typing import Any

import yaml
from ray.serve.schema import ServeDeploySchema

from lgd.serve.guard import bound_proxy, make_proxy_variables
from lgd.serve.options import DEFAULT_MB, ServeOptions
from tests.cluster.test_rayjob import CLUSTER, assert_cluster_is_of_kuberay
from tests.cluster.test_rayjob import pods as job_pods

# The fields of ray.io/v1 that KubeRay's API reference names.
SERVICE = """deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy rayClusterConfig
rayClusterDeletionDelaySeconds serveConfigV2 serveService serviceUnhealthySecondThreshold suspend
upgradeStrategy""".split()


def service() -> dict[str, Any]:
    (document,) = yaml.safe_load_all((CLUSTER / "rayservice.yaml").read_text())
    return document


def serve_config() -> dict[str, Any]:
    return yaml.safe_load(service()["spec"]["serveConfigV2"])


def pods() -> dict[str, dict[str, Any]]:
    cluster = service()["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"]["spec"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"]["spec"], **groups}


def test_every_field_is_one_of_kuberay():
    document = service()
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    assert set(document["spec"]) <= set(SERVICE)
    assert_cluster_is_of_kuberay(document["spec"]["rayClusterConfig"], pods())


def test_the_application_is_one_that_ray_serve_and_lgd_know():
    (application,) = ServeDeploySchema.model_validate(serve_config()).applications
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    options = ServeOptions.read(application.args)
    assert options.token_file and options.slides


def test_what_it_reads_is_mounted():
    options = ServeOptions.read(serve_config()["applications"][0]["args"])
    for pod in pods().values():
        (container,) = pod["containers"]
        mounted = [mount["mountPath"] for mount in container["volumeMounts"]]
        for path in (options.model, options.slides, options.out, options.token_file):
            assert any(path.startswith(f"{place}/") for place in mounted), path
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_copies_fit_the_nodes():
    options = ServeOptions.read(serve_config()["applications"][0]["args"])
    (group,) = service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    # And one that scores slides.
    assert options.gpus * (options.replicas + 1) <= group["replicas"] * int(limits["nvidia.com/gpu"])
    assert options.cpus * (options.replicas + 1) <= group["replicas"] * int(limits["cpu"])


def test_the_proxies_of_all_nodes_bound_bodies():
    variables = make_proxy_variables(DEFAULT_MB)
    for pod in pods().values():
        (container,) = pod["containers"]
        assert {one["name"]: one["value"] for one in container["env"]} == variables
    (callback,) = (value for name, value in variables.items() if name.endswith("IMPORT_PATH"))
    module, name = callback.split(":")
    assert getattr(importlib.import_module(module), name) is bound_proxy
    ServeOptions.read(serve_config()["applications"][0]["args"] | {"max_mb": DEFAULT_MB})


def test_it_needs_a_token_and_writes_none_down():
    text = (CLUSTER / "rayservice.yaml").read_text()
    assert service()["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    assert "LoadBalancer" not in text and "NodePort" not in text
    # A random token is 32 letters and digits or more.
    assert not re.search(r"[0-9a-f]{32}", text)


def test_pods_are_those_of_the_job_without_privileges():
    job = next(iter(job_pods().values()))
    for pod in pods().values():
        assert pod["securityContext"] == job["securityContext"]
        assert pod["automountServiceAccountToken"] is False
        ((container,), (known,)) = (pod["containers"], job["containers"])
        assert (container["image"], container["securityContext"]) == (known["image"], known["securityContext"])
