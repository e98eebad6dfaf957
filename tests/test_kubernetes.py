"""deploy/kubernetes.yaml follows the schemas of Kubernetes, and its parts fit together."""

from __future__ import annotations

import copy
import re
from typing import Any

import kubernetes_validate
import pytest
import yaml
from test_deploy import CODES, DEPLOY, GRACE, GUIDE, instructions, run_check

from benchmarks.fake_cog import FakeCog
from llama.gateway.settings import GatewaySettings

Part = dict[str, Any]

PARTS: dict[tuple[str, str], Part] = {
    (part["kind"], part["metadata"]["name"]): part
    for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
}
OLDEST, NEWEST = "1.30", "1.37"  # the versions that are checked


def spec(kind: str, name: str) -> Part:
    found: Part = PARTS[kind, name]["spec"]
    return found


def pods() -> dict[str, Part]:
    """The specs of all pods, by the name of the Deployment or Job."""
    return {
        name: part["spec"]["template"]["spec"]
        for (kind, name), part in PARTS.items()
        if kind in ("Deployment", "Job")
    }


def containers(pod: Part) -> list[Part]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def labels(kind: str, name: str) -> Part:
    found: Part = spec(kind, name)["template"]["metadata"]["labels"]
    return found


# --- the schemas


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("part", PARTS, ids=" ".join)
def test_every_part_follows_the_schema(part: tuple[str, str], version: str) -> None:
    kubernetes_validate.validate(PARTS[part], version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replicsa"), 1),
        (("spec", "template", "spec", "containers", 0, "livenessProbe", "httpGet", "paht"), "/healthz"),
        (("spec", "template", "spec", "securityContext", "runAsUser"), "root"),
        (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "8000"),
    ],
)
def test_the_check_finds_a_planted_mistake(path: tuple[Any, ...], value: object) -> None:
    part = copy.deepcopy(PARTS["Deployment", "llama-gateway"])
    inner: Any = part
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(part, NEWEST, strict=True)


# --- all pods


@pytest.mark.parametrize("name", pods())
def test_every_pod_is_confined(name: str) -> None:
    pod = pods()[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False  # see the comments in the file
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert ":" in container["image"].rpartition("/")[2], "an image without a tag"
        assert container["resources"]["requests"]["cpu"]
        assert container["resources"]["limits"]["memory"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_no_secret_is_in_the_file_and_only_the_download_gets_the_token() -> None:
    assert not [kind for kind, _ in PARTS if kind == "Secret"]
    found = [
        (container["name"], variable["name"], variable["valueFrom"]["secretKeyRef"]["name"])
        for pod in pods().values()
        for container in containers(pod)
        for variable in container.get("env", ())
        if "valueFrom" in variable
    ]
    assert found == [
        ("pull", "HF_TOKEN", "huggingface"),
        ("gateway", "LLAMA_GATEWAY_KEY", "llama-gateway"),
        ("gateway", "LLAMA_GATEWAY_METRICS_KEY", "llama-gateway"),
    ]


def test_every_volume_claim_exists() -> None:
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for pod in pods().values()
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {name for kind, name in PARTS if kind == "PersistentVolumeClaim"}


# --- the model


def test_the_server_waits_for_the_folder_that_the_job_packs() -> None:
    job, server = spec("Job", "llama-weights"), spec("Deployment", "llama")
    (pack,), (wait,) = (job["template"]["spec"]["containers"], server["template"]["spec"]["initContainers"])
    (container,) = server["template"]["spec"]["containers"]
    (packed,) = (e["value"] for e in container["env"] if e["name"] == "LLAMA_WEIGHTS")
    assert f"weights pack {packed} " in pack["command"][-1]
    assert f"test -d {packed};" in wait["command"][-1]
    assert server["progressDeadlineSeconds"] >= 3600


def test_the_job_runs_on_the_node_of_the_server_because_they_share_a_volume() -> None:
    claim = spec("PersistentVolumeClaim", "llama-weights")
    assert claim["accessModes"] == ["ReadWriteOnce"]  # otherwise, the Job could run anywhere
    job, server = pods()["llama-weights"], pods()["llama"]
    (term,) = job["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["labelSelector"] == {"matchLabels": labels("Deployment", "llama")}
    assert term["topologyKey"] == "kubernetes.io/hostname"
    gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    assert job["tolerations"] == server["tolerations"] == [gpu]


@pytest.mark.parametrize("probe", ["startupProbe", "readinessProbe", "livenessProbe"])
@pytest.mark.parametrize(("status", "code"), CODES.items())
def test_a_probe_of_the_model_reads_the_status_and_leaves_a_restart_to_kubernetes(
    status: str, code: int, probe: str
) -> None:
    (container,) = pods()["llama"]["containers"]
    with FakeCog(health=status) as cog:
        assert run_check(container[probe]["exec"]["command"], cog.url) == (code, "", "")


# --- the gateway


def test_the_gateway_finds_every_replica_of_the_model() -> None:
    (gateway,) = pods()["llama-gateway"]["containers"]
    server = gateway["args"][gateway["args"].index("--server") + 1]
    service = spec("Service", "llama-model")
    assert service["clusterIP"] == "None"  # the text means that the name has the address of each pod
    assert service["selector"] == labels("Deployment", "llama")
    assert server == f"http://llama-model:{service['ports'][0]['port']}"
    # The name is that of the pods themselves, so the port has to be theirs.
    assert service["ports"][0]["port"] == pods()["llama"]["containers"][0]["ports"][0]["containerPort"]


def test_there_is_one_gateway_because_its_database_has_one_writer() -> None:
    gateway = spec("Deployment", "llama-gateway")
    assert (gateway["replicas"], gateway["strategy"]) == (1, {"type": "Recreate"})
    (data,) = (v for v in gateway["template"]["spec"]["volumes"] if "persistentVolumeClaim" in v)
    (container,) = gateway["template"]["spec"]["containers"]
    assert {"name": data["name"], "mountPath": "/data"} in container["volumeMounts"]
    assert any("LLAMA_GATEWAY_DATABASE=/data/" in line for line in instructions("ENV"))


def test_the_gateways_settings_exist_and_its_user_is_that_of_the_image() -> None:
    (container,) = pods()["llama-gateway"]["containers"]
    known = {f"LLAMA_GATEWAY_{name.upper()}" for name in GatewaySettings.model_fields}
    assert {variable["name"] for variable in container["env"]} <= known
    context = pods()["llama-gateway"]["securityContext"]
    assert instructions("USER") == [f"{context['runAsUser']}:{context['runAsGroup']}"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_gateway_has_more_time_to_stop_than_it_takes() -> None:
    pod = pods()["llama-gateway"]
    before = float(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert pod["terminationGracePeriodSeconds"] >= before + GRACE + 10


def test_a_gateway_whose_servers_are_not_ready_keeps_its_place_in_the_service() -> None:
    (container,) = pods()["llama-gateway"]["containers"]
    for probe in ("livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "http"}


def test_requests_get_from_the_ingress_to_the_gateway() -> None:
    ingress, service = spec("Ingress", "llama-gateway"), spec("Service", "llama-gateway")
    (rule,) = ingress["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "llama-gateway", "port": {"name": service["ports"][0]["name"]}}
    assert service["selector"] == labels("Deployment", "llama-gateway")
    assert ingress["tls"][0]["hosts"] == [rule["host"]]
    (container,) = pods()["llama-gateway"]["containers"]
    assert {"name": "LLAMA_GATEWAY_PUBLIC_URL", "value": f"https://{rule['host']}"} in container["env"]
    annotations = PARTS["Ingress", "llama-gateway"]["metadata"]["annotations"]
    size = int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"])
    assert size == GatewaySettings.model_fields["max_body"].default


def test_the_guides_pod_for_a_restore_has_the_gateways_volume_and_user() -> None:
    (text,) = re.findall(r"<<'END'\n(.*?)\nEND\n", GUIDE, re.DOTALL)
    pod = yaml.safe_load(text)
    for version in (OLDEST, NEWEST):
        kubernetes_validate.validate(pod, version, strict=True)
    gateway = pods()["llama-gateway"]
    assert pod["spec"]["volumes"] == [v for v in gateway["volumes"] if "persistentVolumeClaim" in v]
    assert pod["spec"]["securityContext"].items() <= gateway["securityContext"].items()
    (container,) = pod["spec"]["containers"]
    assert container["image"] == gateway["containers"][0]["image"]
    assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
    assert "labels" not in pod["metadata"]  # otherwise, the Service could send requests to it


def test_the_guides_scrape_job_is_that_of_compose_with_the_services_address() -> None:
    (block,) = re.findall(r"```yaml\n(scrape_configs:.*?)```", GUIDE, re.DOTALL)
    (job,) = yaml.safe_load(block)["scrape_configs"]
    (usual,) = yaml.safe_load((DEPLOY / "monitoring/prometheus.yml").read_text("utf-8"))["scrape_configs"]
    (port,) = spec("Service", "llama-gateway")["ports"]
    assert job["static_configs"] == [{"targets": [f"llama-gateway.default.svc:{port['port']}"]}]
    key = {"type": "Bearer", "credentials_file": job["authorization"]["credentials_file"]}
    assert job == {**usual, "authorization": key, "static_configs": job["static_configs"]}


# --- who reaches whom


def sources(policy: str) -> list[Part]:
    return [source for rule in spec("NetworkPolicy", policy)["ingress"] for source in rule["from"]]


def test_every_pod_has_a_policy_for_both_directions() -> None:
    policies = [part["spec"] for (kind, _), part in PARTS.items() if kind == "NetworkPolicy"]
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    selected = [policy["podSelector"]["matchLabels"] for policy in policies]
    for kind, name in PARTS:
        if kind in ("Deployment", "Job"):
            assert selected.count(labels(kind, name)) == 1


def test_the_model_is_reached_by_the_gateway_only_and_reaches_nothing() -> None:
    policy = spec("NetworkPolicy", "llama")
    gateway = labels("Deployment", "llama-gateway")
    assert sources("llama") == [{"podSelector": {"matchLabels": gateway}}]
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": 5000}]
    assert policy["egress"] == []


def test_the_gateway_is_reached_from_the_ingress_controller_and_prometheus_only() -> None:
    allowed = [next(iter(s["namespaceSelector"]["matchLabels"].values())) for s in sources("llama-gateway")]
    assert allowed == ["ingress-nginx", "monitoring"]
    (container,) = pods()["llama-gateway"]["containers"]
    port = spec("NetworkPolicy", "llama-gateway")["ingress"][0]["ports"][0]["port"]
    assert port == container["ports"][0]["containerPort"]


def test_the_gateway_may_connect_to_the_model() -> None:
    egress = spec("NetworkPolicy", "llama-gateway")["egress"]
    rule = {
        "to": [{"podSelector": {"matchLabels": labels("Deployment", "llama")}}],
        "ports": [{"protocol": "TCP", "port": 5000}],
    }
    assert rule in egress
